"""Heads are exported from the checkpoint that drafts best, however the run ended; a model is exported as it is last."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from layerskip_model.errors import UserError
from tests.train.tiny_heads import medusa_values, write_base
from tests.train.tiny_runs import at_step, log_lines, recipe_values, write_text
from train import loop, parse_recipe, train
from train.best import MEASURED_NAME, Best, find_best
from train.checkpoint import list_checkpoints
from train.config import EvaluateConfig
from train.engine import Engine

# New heads guess that the last token is said again, which is what the model mostly does; the growing learning rate
# takes that from them step by step.
SPOILING: dict[str, Any] = {
    "max_steps": 6,
    "batch": {"sequences": 8, "length": 24},
    "checkpoint": {"every": 2, "keep": 1},
    "evaluate": {"every": 2, "decode": {"prompts": 4, "new_tokens": 12, "num_speculations": 3}},
    "optimizer": {"kind": "adamw", "lr": 0.1},
    "schedule": {"warmup_steps": 6},
}


class Crash(Exception):
    """Stands for a killed process."""


def crash(*_: Any) -> None:
    raise Crash


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def base(text: Path) -> Path:
    directory = write_base(text / "base", text, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.1
        layer.mlp.down_proj.weight.data *= 0.1
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def spoilt(text: Path, base: Path) -> Path:
    """A run whose heads get worse."""
    return train(parse_recipe(medusa_values(text / "run", text, base, **SPOILING)))


def told(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    return content


def logged(run: Path, name: str) -> dict[int, float]:
    """A number after each step that it was logged for."""
    return {line["step"]: line[name] for line in log_lines(run) if name in line}


def assert_exported(run: Path, checkpoint: Path) -> None:
    """The heads of a checkpoint, bit for bit."""
    ours = load_file(run / "export" / "medusa_lm_head.safetensors")
    saved = load_file(checkpoint / "trainable.safetensors")
    for head in range(3):
        name = f"{head}.0.linear.weight"
        assert torch.equal(ours[name], saved[f"module.heads.blocks.{name}"])


def test_the_checkpoint_that_drafts_best_is_exported(spoilt: Path) -> None:
    lengths = logged(spoilt, "decode/acceptance_length")
    assert lengths.keys() == {2, 4, 6}
    assert lengths[2] > lengths[6]
    content = told(spoilt)
    assert content["best"] == {"step": 2, "acceptance_length": lengths[2], "by": "decode"}
    assert content["training"]["steps"] == 6
    kept = list_checkpoints(spoilt / "checkpoints")
    assert [path.name for path in kept] == ["step-00000002", "step-00000006"]
    assert_exported(spoilt, kept[0])


def test_what_is_told_is_of_what_is_exported(spoilt: Path) -> None:
    content, lines = told(spoilt), log_lines(spoilt)
    (heldout,) = (line for line in lines if line["step"] == 2 and "heldout/loss" in line)
    assert content["heldout_metrics"] == {
        name.removeprefix("heldout/"): value for name, value in heldout.items() if name != "step"
    }
    assert content["suggested"]["acceptance_length"] > logged(spoilt, "decode/acceptance_length")[6]
    assert list(logged(spoilt, "heldout/loss")) == [2, 4, 6]  # the last step's, too


@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_chooses_the_same(
    step: int, spoilt: Path, text: Path, base: Path, tmp_path: Path
) -> None:
    recipe = parse_recipe(medusa_values(tmp_path / "run", text, base, **SPOILING))
    with at_step(step, crash), pytest.raises(Crash):
        train(recipe)
    assert_same_choice(train(recipe), spoilt)


@pytest.mark.parametrize("where", ["decode", "remember", "suggest"])
def test_a_crash_between_checkpoint_and_export_changes_nothing(
    where: str, spoilt: Path, text: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that lacks its numbers gets them when the run goes on, and every line is logged once."""
    recipe = parse_recipe(medusa_values(tmp_path / "run", text, base, **SPOILING))
    with monkeypatch.context() as patch:
        patch.setattr(loop, where, crash)
        with pytest.raises(Crash):
            train(recipe)
    assert_same_choice(train(recipe), spoilt)


def assert_same_choice(ours: Path, theirs: Path) -> None:
    assert told(ours)["best"] == told(theirs)["best"]
    assert log_lines(ours) == log_lines(theirs)
    assert_exported(ours, theirs / "checkpoints" / "step-00000002")


def test_what_cannot_be_decoded_is_compared_teacher_forced(
    text: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process stands for those that share the heads."""
    monkeypatch.setattr(Engine, "is_whole", False)
    run = train(parse_recipe(medusa_values(tmp_path / "run", text, base, **SPOILING)))
    assert logged(run, "decode/acceptance_length") == {}
    lengths = logged(run, "heldout/acceptance_length")
    best = max(lengths, key=lambda step: (lengths[step], step))
    assert best != 6
    assert told(run)["best"] == {"step": best, "acceptance_length": lengths[best], "by": "teacher-forced"}
    assert_exported(run, run / "checkpoints" / f"step-{best:08d}")


@pytest.mark.parametrize("objective", [{"kind": "eagle"}, {"kind": "eagle3", "feature_layers": [1, 2, 3]}])
def test_a_draft_layer_is_chosen_by_its_own_decode(
    objective: dict[str, Any], text: Path, base: Path, tmp_path: Path
) -> None:
    values = medusa_values(tmp_path / "run", text, base, **SPOILING)
    run = train(parse_recipe(values | {"objective": objective | {"steps": 2}}))
    lengths = logged(run, "decode/acceptance_length")
    best = max(lengths, key=lambda step: (lengths[step], step))
    assert told(run)["best"] == {"step": best, "acceptance_length": lengths[best], "by": "decode"}
    assert all(value == 1.0 for value in logged(run, "decode/equal_tokens").values())


@pytest.mark.parametrize("evaluate", [{}, {"every": 2}])
def test_without_decodes_the_last_one_is_exported(
    evaluate: dict[str, Any], text: Path, base: Path, tmp_path: Path
) -> None:
    values = medusa_values(tmp_path / "run", text, base, **SPOILING | {"evaluate": evaluate})
    run = train(parse_recipe(values))
    (last,) = list_checkpoints(run / "checkpoints")
    assert_exported(run, last)
    assert not (last / MEASURED_NAME).exists()
    assert told(run)["best"] is None


def test_a_model_that_trains_is_exported_as_it_is_last(text: Path, tmp_path: Path) -> None:
    values = recipe_values(tmp_path / "run", text, **SPOILING)
    run = train(parse_recipe(values))
    assert logged(run, "decode/acceptance_length").keys() == {2, 4, 6}
    assert told(run)["best"] is None
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000006"]


def test_a_best_one_that_is_damaged_is_one_line_and_the_next_is_taken(
    text: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(medusa_values(tmp_path / "run", text, base, **SPOILING))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "suggest", crash)
        with pytest.raises(Crash):
            train(recipe)
    best, last = list_checkpoints(tmp_path / "run" / "checkpoints")
    (best / "trainable.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=rf"checkpoint {best} cannot be resumed .*; delete it"):
        train(recipe)
    best.rename(tmp_path / "away")
    run = train(recipe)
    assert told(run)["best"]["step"] == 6
    assert_exported(run, last)


# --- which one is the best, by what lies beside the checkpoints

HOW = EvaluateConfig.model_validate({"decode": {}})


def run_with(directory: Path, *measured: dict[str, Any]) -> Any:
    """What of a run `find_best` looks at; checkpoints with and without numbers."""
    for step, numbers in enumerate(measured, start=1):
        checkpoint = directory / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text("{}")
        if numbers:
            told = {"step": step, "heldout": {}, "how": HOW.model_dump(mode="json")} | numbers
            (checkpoint / MEASURED_NAME).write_text(json.dumps(told))
    return SimpleNamespace(directory=directory, recipe=SimpleNamespace(evaluate=HOW))


def lengths(decode: float | None, forced: float | None) -> dict[str, Any]:
    both = {"decode": decode, "teacher-forced": forced}
    return {"lengths": {name: length for name, length in both.items() if length is not None}}


@pytest.mark.parametrize(
    ("measured", "step", "by"),
    [
        ([lengths(2.0, 1.5), lengths(3.0, 1.2), lengths(2.5, 1.9)], 2, "decode"),
        ([lengths(2.0, 1.5), lengths(2.0, 1.2), {}], 2, "decode"),  # of equals the later one
        ([lengths(3.0, 1.5), lengths(None, 1.9), lengths(2.5, 1.4)], 2, "teacher-forced"),  # like with like
        ([lengths(3.0, 1.5), lengths(None, None)], 1, "teacher-forced"),
        ([lengths(3.0, 1.5) | {"how": {"decode": None}}, lengths(2.0, 1.2)], 2, "decode"),
    ],
)
def test_like_is_compared_with_like(
    measured: list[dict[str, Any]], step: int, by: str, tmp_path: Path
) -> None:
    best = find_best(run_with(tmp_path, *measured))
    assert isinstance(best, Best)
    assert (best.step, best.by) == (step, by)


def test_where_nothing_is_known_none_is_the_best(tmp_path: Path) -> None:
    assert find_best(run_with(tmp_path / "none")) is None
    assert find_best(run_with(tmp_path / "unmeasured", {}, lengths(None, None))) is None
    damaged = run_with(tmp_path / "damaged", lengths(2.0, 1.5), lengths(3.0, 1.5))
    (tmp_path / "damaged" / "checkpoints" / "step-00000002" / MEASURED_NAME).write_text("{")
    best = find_best(damaged)
    assert best is not None
    assert best.step == 1
