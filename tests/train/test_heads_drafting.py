"""Decoding with heads while they train: what it tells, which chain it suggests, and that nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from eval.decoding.drafters.heads import DraftHeads
from eval.decoding.strategies import make_drafter
from eval.drafts import with_loaded_drafts
from eval.replay import OwnText, continued
from eval.target import Target, load_target
from tests.train.test_drafting import Looked, numbers
from tests.train.tiny_heads import medusa_values, write_base
from tests.train.tiny_runs import launch_two, log_lines, start, write_recipe, write_text
from train import UserError, drafting, parse_recipe, train
from train.engine import Engine
from train.objectives.self_speculation import COST_PER_ROW
from train.run import Run

NEW = 12
SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "batch": {"sequences": 8, "length": 24},
    "checkpoint": {"every": 3},
    "evaluate": {"decode": {"prompts": 2, "new_tokens": NEW, "num_speculations": 2}},
    "optimizer": {"kind": "adamw", "lr": 0.01},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def base(text: Path) -> Path:
    """A model that mostly says the last token again, so that new heads are often right."""
    directory = write_base(text / "base", text, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.1
        layer.mlp.down_proj.weight.data *= 0.1
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def decoded(text: Path, base: Path) -> Path:
    """A run that decodes at its checkpoints, by the program itself."""
    recipe = write_recipe(text / "recipe.yaml", medusa_values(text / "run", text, base, **SETTINGS))
    process = start("-m", "train", str(recipe))
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert "decoded after step 3: medusa num_speculations 2: acceptance length " in error
    told = json.loads((text / "run" / "run.json").read_text())["suggested"]
    gain = f"medusa num_speculations {told['settings']['num_speculations']}: {told['acceptance_length']:.2f}"
    assert error.splitlines()[-1].endswith(f"; {gain} tokens a forward on held-out prompts")
    return text / "run"


def prompts_of(run: Path, target: Target) -> list[list[int]]:
    """What a run decoded: its two held-out prompts, shortened."""
    rows = [json.loads(line)["prompt"] for line in (run / "heldout.jsonl").read_text().splitlines()]
    return [target.encode(row)[-NEW:] for row in rows]


def acceptance(target: Target, prompts: list[list[int]], new: int, **settings: Any) -> float:
    drafter = make_drafter("medusa", target.runner, **with_loaded_drafts(target, "medusa", settings))
    rows = continued(target.runner, drafter, prompts, new, target.eos_token_ids)
    lengths = [length for row in rows for length in row.accepted_lengths]
    return sum(lengths) / len(lengths)


def test_every_checkpoint_is_decoded_as_the_export_decodes(decoded: Path) -> None:
    lines = numbers(decoded)
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        assert line["decode/equal_tokens"] == 1.0
        assert line["decode/num_speculations"] == 2
        assert 1.5 < line["decode/acceptance_length"] <= 3.0
    target = load_target(run=str(decoded))
    prompts = prompts_of(decoded, target)
    found = acceptance(target, prompts, NEW, draft=str(decoded), num_speculations=2)
    assert lines[-1]["decode/acceptance_length"] == pytest.approx(found)


def test_the_suggestion_is_the_chain_that_pays_most(decoded: Path, tmp_path: Path) -> None:
    """By decoding with every length of it; the run's own prompts, the recipe's few tokens."""
    told = json.loads((decoded / "run.json").read_text())["suggested"]
    target = load_target(run=str(decoded))
    lengths = {
        depth: acceptance(
            target, prompts_of(decoded, target), NEW, draft=str(decoded), num_speculations=depth
        )
        for depth in (1, 2, 3)
    }
    speedups = {depth: length / (1 + COST_PER_ROW * depth) for depth, length in lengths.items()}
    best = max(speedups, key=speedups.__getitem__)
    assert told["settings"] == {"num_speculations": best}
    assert best > 1
    assert told["predicted_speedup"] == pytest.approx(speedups[best])
    assert told["acceptance_length"] == pytest.approx(lengths[best])


def test_heads_learn_the_same_without(decoded: Path, text: Path, base: Path, tmp_path: Path) -> None:
    values = medusa_values(tmp_path / "run", text, base, **SETTINGS | {"evaluate": {}})
    train(parse_recipe(values))
    assert numbers(tmp_path / "run") == []
    kept = ("loss", "heldout/loss")  # which are evaluated at every checkpoint, too, for the choice of one
    lines = {
        run: [line for line in log_lines(run) if line.keys() & kept] for run in (decoded, tmp_path / "run")
    }
    assert [line for line in lines[tmp_path / "run"] if line not in lines[decoded]] == []
    assert [line["step"] for line in lines[decoded] if line not in lines[tmp_path / "run"]] == [3]


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_model_and_heads_come_back_as_they_were(
    kind: str, text: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = Looked(monkeypatch)
    train(parse_recipe(medusa_values(tmp_path / "run", text, base, objective={"kind": kind}, **SETTINGS)))
    assert looked.changed == []
    assert [line["step"] for line in numbers(tmp_path / "run")] == [3, 6]


@pytest.mark.slow
def test_two_processes(decoded: Path, text: Path, base: Path, tmp_path: Path) -> None:
    """One of them decodes, the other waits."""
    path = write_recipe(tmp_path / "recipe.yaml", medusa_values(tmp_path / "run", text, base, **SETTINGS))
    launched = launch_two("train", str(path))
    _, error = launched.communicate(timeout=600)
    assert launched.returncode == 0, error
    for ours, theirs in zip(numbers(tmp_path / "run"), numbers(decoded), strict=True):
        assert ours == pytest.approx(theirs)


def test_sharded_heads_are_not_decoded_with_which_is_said_once(
    text: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One process stands for those that share them."""
    monkeypatch.setattr(Engine, "is_whole", False)
    train(parse_recipe(medusa_values(tmp_path / "run", text, base, **SETTINGS)))
    assert capsys.readouterr().err.count("its heads are sharded") == 1
    assert numbers(tmp_path / "run") == []
    told = json.loads((tmp_path / "run" / "run.json").read_text())["suggested"]  # by held-out text
    assert (told["strategy"], told["settings"]) == ("medusa", {})


def test_a_model_that_trains_with_its_heads_is_decoded(decoded: Path, text: Path, tmp_path: Path) -> None:
    """As it stands, its adapters in it."""
    objective = {"stage": "joint", "init_heads": str(decoded)}
    model = {"lora": {"rank": 2}}
    values = medusa_values(
        tmp_path / "run", text, text / "base", objective=objective, model=model, **SETTINGS
    )
    run = train(parse_recipe(values))
    (*_, last) = numbers(run)
    assert last["decode/equal_tokens"] == 1.0
    target = load_target(run=str(run))
    found = acceptance(
        target, prompts_of(run, target), NEW, draft=str(run / "export" / "heads"), num_speculations=2
    )
    assert last["decode/acceptance_length"] == pytest.approx(found, abs=0.3)  # merged, so ties may differ


def test_where_nothing_is_won_one_draft_is_enough(
    text: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And answers that end at once are no division by zero."""
    seen: list[tuple[Run, OwnText]] = []
    original = drafting.write

    def write(run: Run, target: Target, config: Any) -> OwnText:
        seen.append((run, original(run, target, config)))
        return seen[-1][1]

    monkeypatch.setattr(drafting, "write", write)
    train(parse_recipe(medusa_values(tmp_path / "run", text, base, **SETTINGS | {"max_steps": 1})))
    run, written = seen[-1]
    objective: Any = run.objective
    for parameter in objective.module.heads.parameters():
        parameter.data.zero_()
    told = objective.suggestion({}, written, {})
    assert told["settings"] == {"num_speculations": 1}
    ended = OwnText(written.runner, written.prompts, [text[:1] for text in written.texts], [False] * 2)
    assert objective.suggestion({}, ended, {})["acceptance_length"] == 1.0


def test_the_suggested_depth_is_for_the_heads_own_chain(decoded: Path, tmp_path: Path) -> None:
    """A tree that is given or lies beside them is drafted whole, and other heads have their own number."""
    from eval.strategy_spec import Spec, settings_for

    target = load_target(run=str(decoded))
    plain = settings_for(Spec("medusa"), target, {})
    assert plain.keys() == {"draft", "num_speculations"}
    assert settings_for(Spec("medusa"), target, {"tree": "chain"}).keys() == {"draft", "tree"}
    assert settings_for(Spec("medusa", {"draft": "others"}), target, {}) == {"draft": "others"}
    assert settings_for(Spec("medusa", {"num_speculations": 3}), target, {})["num_speculations"] == 3
    beside = decoded / "export" / "tree.json"
    beside.write_text(json.dumps({"paths": [[0], [0, 0], [0, 0, 0], [1]]}))
    try:
        found = settings_for(Spec("medusa"), target, {})
        draft = with_loaded_drafts(target, "medusa", found)["draft"]
    finally:
        beside.unlink()
    assert found.keys() == {"draft"}
    assert isinstance(draft, DraftHeads)
    assert draft.tree.depth == 3


def test_heads_have_no_exit_to_decode_with(text: Path, base: Path, tmp_path: Path) -> None:
    changes = SETTINGS | {"evaluate": {"decode": {"exit_layer": 1}}}
    with pytest.raises(UserError, match=r"evaluate\.decode\.exit_layer: .* leave it out"):
        train(parse_recipe(medusa_values(tmp_path / "run", text, base, **changes)))
