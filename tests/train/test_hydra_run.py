"""Whole runs that train Hydra heads: what they leave alone, what they leave behind, and how they go on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eval.target import load_target, open_run
from layerskip_model.backbone import Backbone
from layerskip_model.formats.fingerprint import fingerprint
from layerskip_model.formats.hydra import load_hydra
from tests.train.tiny_heads import medusa_values, write_base
from tests.train.tiny_runs import at_step, log_lines, start, write_recipe
from tests.train.tiny_runs import write_text as write_text_into
from train import Interrupted, UserError, parse_recipe, train
from train.checkpoint import list_checkpoints

PLUS: dict[str, Any] = {"kind": "hydra", "layers": 2, "prefix_attention": True, "dropout": 0.2}
KEPT = {"every": 2, "keep": 9}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_into(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def base(text: Path) -> Path:
    return write_base(text / "base", text)


@pytest.fixture(scope="module")
def first(text: Path, base: Path) -> Path:
    """A run of Hydra++ with dropout, by the program."""
    values = medusa_values(text / "first", text, base, objective=PLUS, max_steps=6, checkpoint=KEPT)
    process = start("-m", "train", str(write_recipe(text / "first.yaml", values)))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert " MB each" in error
    return text / "first"


def heads_of(run: Path) -> dict[str, Tensor]:
    folder = open_run(run).heads
    assert folder is not None
    return load_file(folder / "hydra_lm_head.safetensors")


def test_a_run_leaves_the_heads_and_the_name_of_their_model(first: Path, base: Path) -> None:
    told = json.loads((first / "run.json").read_text())
    assert (told["kind"], told["base"], told["heads"]) == ("hydra", str(base), "export")
    assert told["fingerprint"] == fingerprint(base)
    assert told["heldout_metrics"]["acceptance_length"] >= 1.0
    target = load_target(run=str(first))
    heads = load_hydra(first / "export", Backbone(target.model))
    assert (heads.number, heads.layers, heads.prefix is not None) == (3, 2, True)


def test_only_heads_are_in_checkpoints_and_all_of_them_have_learnt(first: Path) -> None:
    saved = list_checkpoints(first / "checkpoints")
    before, after = (load_file(saved[index] / "trainable.safetensors") for index in (0, -1))
    assert all(name.startswith("module.heads.") for name in after)
    assert len(after) == len(heads_of(first))
    assert [name for name in after if torch.equal(before[name], after[name])] == []
    optimizer = torch.load(saved[-1] / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(after)


def test_the_model_is_left_alone(first: Path, base: Path, text: Path, tmp_path: Path) -> None:
    """Every byte on disk; the heads get better at what they learn."""
    before = fingerprint(base)
    objective = PLUS | {"dropout": 0.0}
    run = train(parse_recipe(medusa_values(tmp_path / "run", text, base, objective=objective, max_steps=20)))
    assert fingerprint(base) == before == json.loads((run / "run.json").read_text())["fingerprint"]
    steps = [line for line in log_lines(run) if "head_3/divergence" in line]
    assert steps[-1]["head_3/divergence"] < steps[0]["head_3/divergence"] - 0.1


@pytest.mark.parametrize("objective", [{}, {"shared_projection": True, "loss": "labels"}])
def test_however_the_batch_is_cut(objective: dict[str, Any], text: Path, base: Path, tmp_path: Path) -> None:
    """Each head's sum is divided by its own count over the whole batch."""
    method = PLUS | {"dropout": 0.0} | objective
    for name, micro in (("whole", None), ("micro", 3)):
        batch = {"sequences": 8, "length": 16, "micro": micro}
        train(parse_recipe(medusa_values(tmp_path / name, text, base, objective=method, batch=batch)))
    ours, theirs = heads_of(tmp_path / "whole"), heads_of(tmp_path / "micro")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=2e-5)


def test_stopped_equals_never_stopped(first: Path, text: Path, base: Path, tmp_path: Path) -> None:
    """Dropout included: what it draws is a function of the seed, the step and the rank."""
    values = medusa_values(tmp_path / "run", text, base, objective=PLUS, max_steps=6, checkpoint=KEPT)
    recipe = parse_recipe(values)
    with at_step(3, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train(recipe)
    train(recipe)
    ours, theirs = heads_of(tmp_path / "run"), heads_of(first)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log_lines(tmp_path / "run") == log_lines(first)


def test_a_run_may_begin_from_earlier_heads(first: Path, text: Path, base: Path, tmp_path: Path) -> None:
    earlier = PLUS | {"init_heads": str(first)}
    values = medusa_values(tmp_path / "run", text, base, objective=earlier, max_steps=1)
    values["optimizer"] = {"kind": "adamw", "lr": 1e-12, "weight_decay": 0.0}
    run = train(parse_recipe(values))
    ours, theirs = heads_of(run), heads_of(first)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=1e-6)
    other = earlier | {"layers": 3}
    with pytest.raises(UserError, match=r"objective\.layers: 3, and the heads of init_heads .* have 2"):
        train(parse_recipe(medusa_values(tmp_path / "other", text, base, objective=other)))
