"""Decoding with the model in training: what it tells, and that the model comes back as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from eval.target import load_target
from layerskip_model.errors import UserError
from tests.train.tiny_runs import (
    assert_close_weights,
    assert_equal_weights,
    launch_two,
    log_lines,
    recipe_values,
    start,
    write_recipe,
    write_text,
)
from train import drafting, parse_recipe, train
from train.checkpoint import list_checkpoints
from train.engine import Engine
from train.run import Run
from train.run_directory import CHECKPOINTS_NAME

DECODE = {"prompts": 3, "new_tokens": 12, "num_speculations": 3}
SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "batch": {"sequences": 8, "length": 24},
    "checkpoint": {"every": 2},
    "evaluate": {"decode": DECODE},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def decoded(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that decodes at its checkpoints, by the program itself."""
    folder = tmp_path_factory.mktemp("decoded")
    recipe = write_recipe(folder / "recipe.yaml", recipe_values(folder / "run", text, **SETTINGS))
    process = start("-m", "train", str(recipe))
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert "decoded after step 2: self_speculative exit_layer " in error
    return folder / "run"


def numbers(directory: Path) -> list[dict[str, float]]:
    """The lines of decodes, each with its step."""
    return [line for line in log_lines(directory) if "decode/acceptance_length" in line]


def test_every_checkpoint_is_decoded(decoded: Path) -> None:
    lines = numbers(decoded)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["decode/equal_tokens"] == 1.0
        assert line["decode/num_speculations"] == 3
        assert line["decode/exit_layer"] in (1, 2, 3)
        assert 1.0 <= line["decode/acceptance_length"] <= 4.0
        assert 0.0 <= line["decode/acceptance_rate"] <= 1.0
        assert not any("seconds" in name for name in line)


def test_it_is_what_the_export_does(decoded: Path) -> None:
    """The same prompts, strategy and settings on the exported checkpoint."""
    last = numbers(decoded)[-1]
    target = load_target(run=str(decoded))
    rows = [json.loads(line)["prompt"] for line in (decoded / "heldout.jsonl").read_text().splitlines()]
    chosen = [rows[i * len(rows) // 3] for i in range(3)]
    prompts = [target.encode(prompt)[-12:] for prompt in chosen]
    settings = {"exit_layer": int(last["decode/exit_layer"]), "num_speculations": 3}
    drafter = make_drafter("self_speculative", target.runner, **settings)
    generations = decode(
        target.runner, drafter, prompts, max_new_tokens=12, eos_token_ids=target.eos_token_ids
    )
    lengths = [length for generation in generations for length in generation.accepted_lengths]
    assert last["decode/acceptance_length"] == pytest.approx(sum(lengths) / len(lengths))


def test_training_learns_the_same_without(decoded: Path, text: Path, tmp_path: Path) -> None:
    changes = SETTINGS | {"evaluate": {}}
    train(parse_recipe(recipe_values(tmp_path / "run", text, **changes)))
    assert_equal_weights(decoded, tmp_path / "run")
    assert numbers(tmp_path / "run") == []
    without = [line for line in log_lines(decoded) if "decode/acceptance_length" not in line]
    assert without == log_lines(tmp_path / "run")
    suggested = [
        json.loads((run / "run.json").read_text())["suggested"] for run in (decoded, tmp_path / "run")
    ]
    assert suggested[1]["strategy"] == "self_speculative"
    assert suggested[1]["settings"].keys() == {"exit_layer", "num_speculations"}


def test_two_processes(decoded: Path, text: Path, tmp_path: Path) -> None:
    """One of them decodes, the other waits."""
    path = write_recipe(tmp_path / "recipe.yaml", recipe_values(tmp_path / "run", text, **SETTINGS))
    launched = launch_two("train", str(path))
    _, error = launched.communicate(timeout=600)
    assert launched.returncode == 0, error
    assert_close_weights(tmp_path / "run", decoded)
    for ours, theirs in zip(numbers(tmp_path / "run"), numbers(decoded), strict=True):
        assert ours == pytest.approx(theirs)


class Looked:
    """The model before a decode and after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changed: list[str] = []
        original = drafting.decode

        def around(run: Any, done: int) -> dict[str, float]:
            before = self.look(run)
            found = original(run, done)
            after = self.look(run)
            self.changed += [f"{name} after step {done}" for name in before if before[name] != after[name]]
            return found

        monkeypatch.setattr("train.loop.decode", around)

    def look(self, run: Any) -> dict[str, Any]:
        modules = dict(run.module.named_modules())
        return {
            "modes": [module.training for module in modules.values()],
            "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
            "hooks": sum(len(module._forward_hooks) for module in modules.values()),
            "places": [parameter.data_ptr() for parameter in run.module.parameters()],
            "values": [parameter.sum().item() for parameter in run.module.parameters()],
            "generator": torch.get_rng_state().tolist(),
            "files": sorted(path.name for path in run.directory.iterdir()),
        }


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_comes_back_as_it_was(
    tied: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = Looked(monkeypatch)
    values = recipe_values(tmp_path / "run", text, **SETTINGS)
    values["model"]["config"]["tie_word_embeddings"] = tied
    values["model"]["activation_checkpointing"] = tied
    train(parse_recipe(values))
    assert looked.changed == []
    assert len(numbers(tmp_path / "run")) == 3


def test_an_exit_may_be_given(text: Path, tmp_path: Path) -> None:
    changes = SETTINGS | {"max_steps": 1, "evaluate": {"decode": DECODE | {"exit_layer": 3}}}
    train(parse_recipe(recipe_values(tmp_path / "run", text, **changes)))
    assert [line["decode/exit_layer"] for line in numbers(tmp_path / "run")] == [3]


# --- where the model is sharded, one process standing for them


def test_a_sharded_model_is_decoded_by_a_copy(
    decoded: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "is_whole", False)
    looked = Looked(monkeypatch)
    train(parse_recipe(recipe_values(tmp_path / "run", text, **SETTINGS)))
    assert_equal_weights(tmp_path / "run", decoded)
    assert looked.changed == []
    lines = numbers(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["decode/acceptance_length"] >= 1.0 for line in lines)  # bfloat16: ties may differ


def test_without_room_for_one_that_is_said_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "is_whole", False)
    monkeypatch.setattr(drafting, "ROOM", 0.0)
    train(parse_recipe(recipe_values(tmp_path / "run", text, **SETTINGS)))
    assert capsys.readouterr().err.count("no room for a copy") == 1
    assert numbers(tmp_path / "run") == []
    suggested = json.loads((tmp_path / "run" / "run.json").read_text())["suggested"]  # by held-out text
    assert suggested["settings"]["num_speculations"] in (1, 2, 4, 8)


def test_a_model_that_cannot_be_decoded_trains_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("model type 'x' cannot be decoded here")

    monkeypatch.setattr(drafting, "Runner", refuse)
    train(parse_recipe(recipe_values(tmp_path / "run", text, **SETTINGS)))
    assert capsys.readouterr().err.count("model type 'x' cannot be decoded here") == 1
    assert (tmp_path / "run" / "run.json").is_file()


def test_flash_attention_of_float32_masters_is_not_decoded(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would fail in a kernel, after all of the training and before the export."""
    original = drafting.target_in_training

    @contextmanager
    def with_flash(run: Run) -> Iterator[Any]:
        objective: Any = run.objective
        config = objective.decodable().config
        kept, config._attn_implementation_internal = config._attn_implementation, "flash_attention_2"
        with original(run) as target:
            yield target
        config._attn_implementation_internal = kept

    monkeypatch.setattr(drafting, "target_in_training", with_flash)
    train(parse_recipe(recipe_values(tmp_path / "run", text, **SETTINGS)))
    assert capsys.readouterr().err.count("flash_attention_2 has no float32") == 1
    assert numbers(tmp_path / "run") == []
    assert (tmp_path / "run" / "run.json").is_file()


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), OSError("no space left")])
def test_a_decode_that_fails_costs_no_training(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    """The run is exported, with a suggestion by held-out text, and what failed is said."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(drafting, "continued", fail)
    directory = train(parse_recipe(recipe_values(tmp_path / "run", text, **SETTINGS)))
    assert json.loads((directory / "run.json").read_text())["suggested"]["strategy"] == "self_speculative"
    assert f"as nothing was decoded: {error}" in capsys.readouterr().err


def test_a_mistake_of_ours_while_decoding_comes_after_the_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("a mistake")

    monkeypatch.setattr(drafting, "continued", fail)
    with pytest.raises(TypeError, match="a mistake"):
        train(parse_recipe(recipe_values(tmp_path / "run", text, **SETTINGS)))
    saved = list_checkpoints(tmp_path / "run" / CHECKPOINTS_NAME)
    assert [path.name for path in saved] == ["step-00000002"]


def test_equal_tokens_are_counted_by_place() -> None:
    drafted = [
        Generation(tokens=[1, 2, 3], accepted_lengths=[2, 1], drafted=4, accepted=1),
        Generation([7, 9]),
    ]
    told = drafting.summarize([[1, 5, 3], [7]], drafted)
    assert told == {"acceptance_length": 1.5, "acceptance_rate": 0.25, "equal_tokens": 3 / 5}
