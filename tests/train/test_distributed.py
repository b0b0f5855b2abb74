"""Two gloo processes do what one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from layerskip_model.processes import PATIENCE
from tests.train.tiny_runs import (
    assert_close_logs,
    assert_close_weights,
    launch_two,
    log_lines,
    recipe_values,
    write_recipe,
    write_text,
)
from tests.train.toy_heads import ToyHeads
from train import parse_recipe, train
from train.checkpoint import list_checkpoints
from train.objectives import OBJECTIVES

VARIANTS: dict[str, dict[str, Any]] = {
    "even": {"evaluate": {"sequences": 7}},
    "accumulated": {"batch": {"sequences": 8, "length": 16, "micro": 2}, "checkpoint": {"every": 2}},
    "uneven": {"batch": {"sequences": 7, "length": 16, "micro": 2}},
    "filled_up": {"batch": {"sequences": 3, "length": 16, "micro": 1}},
    "fewer_rows_than_processes": {"batch": {"sequences": 1, "length": 16}},
    "checkpointed": {},
    "toy": {"objective": {"kind": "toy_heads", "cached": True}},
}
TOGETHER = {"even", "accumulated", "checkpointed"}  # the same run, by three ways


class Both(NamedTuple):
    """The same recipe on one process and on two."""

    one: Path
    two: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    """Every variant, on one process here and on two in one launch."""
    folder = tmp_path_factory.mktemp("distributed")
    text = write_text(folder)
    values = {name: recipe_values(folder / name, text, **changes) for name, changes in VARIANTS.items()}
    values["checkpointed"]["model"]["activation_checkpointing"] = True
    paths = [str(write_recipe(folder / f"{name}.yaml", values[name])) for name in values]
    launched = launch_two("tests.train.several_runs", *paths)
    OBJECTIVES["toy_heads"] = ToyHeads
    try:
        for name in values:
            train(parse_recipe(values[name] | {"output_dir": str(folder / f"{name}_one")}))
    finally:
        del OBJECTIVES["toy_heads"]
    _, error = launched.communicate(timeout=600)
    assert launched.returncode == 0, error
    return {name: Both(folder / f"{name}_one", folder / name) for name in values}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_log_what_one_logs(name: str, runs: dict[str, Both]) -> None:
    """Losses, the gradient's norm and held-out metrics; each step once, by the main process."""
    assert_close_logs(runs[name].two, runs[name].one)
    told = [json.loads((run / "run.json").read_text())["heldout_metrics"] for run in runs[name]]
    assert told[0] == pytest.approx(told[1], rel=1e-5)


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"toy"}))
def test_two_processes_learn_what_one_learns(name: str, runs: dict[str, Both]) -> None:
    assert_close_weights(runs[name].two, runs[name].one)


@pytest.mark.parametrize("name", sorted(TOGETHER - {"even"}))
def test_however_the_batch_is_cut(name: str, runs: dict[str, Both]) -> None:
    assert_close_weights(runs[name].two, runs["even"].one)
    logs = [log_lines(run) for run in (runs[name].two, runs["even"].one)]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_toy_heads_too(runs: dict[str, Both]) -> None:
    """Two denominators, batches with hidden states, a frozen model."""
    ours, theirs = (load_file(run / "export" / "heads.safetensors") for run in runs["toy"])
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=2e-5)


def test_two_processes_leave_one_set_of_checkpoints(runs: dict[str, Both]) -> None:
    saved = [[path.name for path in list_checkpoints(run / "checkpoints")] for run in runs["accumulated"]]
    assert saved[0] == saved[1] == ["step-00000002", "step-00000004"]


def told(runs: dict[str, Both]) -> list[dict[str, Any]]:
    return [json.loads((runs["even"].two.parent / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_processes_wait_for_hours(runs: dict[str, Both]) -> None:
    assert [rank["timeout"] for rank in told(runs)] == [PATIENCE.total_seconds()] * 2
    assert PATIENCE.total_seconds() >= 3 * 3600


def test_what_the_main_process_refuses_ends_all_of_them(runs: dict[str, Both]) -> None:
    assert all(
        "holds a run of another recipe (seed: 0 there, 1 here)" in rank["refused"] for rank in told(runs)
    )
