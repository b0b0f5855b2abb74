"""The benchmark of training: what it compares is the same work, and the program says and writes what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from layerskip_model.errors import UserError
from tests.train.small_recipe import small_values, write_documents
from train.benchmark import PLAIN, TRAINER, Contestant, Timing, batches_of, benchmark, timing, variants
from train.config import parse_recipe
from train.memory_benchmark import memory_of_steps, with_exits
from train.objectives.layerskip import LayerSkipConfig
from train.trainer_peer import TrainerPeer


def values(directory: Path, layers: int = 8) -> dict[str, object]:
    given = small_values(max_steps=5)
    given["model"]["config"]["num_hidden_layers"] = layers
    given["data"]["train"][0]["files"] = write_documents(directory)
    given["schedule"] = {"kind": "linear"}
    return given


def test_our_plain_loop_and_the_trainer_learn_the_same(tmp_path: Path) -> None:
    """Same data in the same order, same loss, clipping, schedule and optimizer: the weights end up equal."""
    recipe = parse_recipe(values(tmp_path))
    ours = Contestant(recipe, tmp_path / "run", LayerSkipConfig(kind="layerskip"))
    batches = batches_of(ours.run, 5)
    peer = TrainerPeer(ours.run, tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in peer.model.state_dict().items()}
    steps: list[int] = []

    def before_step(step: int) -> None:
        steps.append(step)
        ours.step(step, batches[step])

    peer.train(batches, before_step)
    assert steps == [0, 1, 2, 3, 4]
    assert len(peer.seconds) == len(ours.seconds) == 5
    assert min(peer.seconds + ours.seconds) > 0
    theirs = peer.model.state_dict()
    for name, tensor in ours.module.model.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(tensor, before[name])


def test_memory_is_that_of_tensors_and_grows_with_exits(tmp_path: Path) -> None:
    recipe = parse_recipe(values(tmp_path))
    run = Contestant(recipe, tmp_path / "run", LayerSkipConfig(kind="layerskip")).run
    plain, *others = memory_of_steps(recipe, tmp_path / "run", 2, batches_of(run, 2))
    weights = sum(p.nbytes for p in run.objective.parameters())
    assert 3 * weights <= plain.resident < 3.1 * weights  # AdamW's two averages, steps and rotary tables
    assert plain.peak > plain.resident + weights
    assert [line.exits for line in others] == [1, 2]
    assert plain.peak < others[0].peak < others[1].peak < 1.05 * plain.peak
    exits = with_exits(recipe, 3).early_exit
    assert exits is not None
    assert exits.exits == [2, 4, 6]


def test_a_step_is_predicted_by_its_flops_and_the_time_of_the_update() -> None:
    line = timing("half", [0.8, 0.7, 0.9], [1.0, 1.0, 1.0], flops_ratio=0.5, update=0.4)
    assert isinstance(line, Timing)
    assert line.predicted == pytest.approx(0.4 + 0.6 * 0.5)
    assert line.ratio.value == pytest.approx(0.8)
    assert line.ratio.low <= 0.8 <= line.ratio.high


def test_variants_have_the_parts_that_their_names_say() -> None:
    for name, config in variants(16, 4).items():
        assert (config.early_exit is not None) == ("R=4" in name)
        assert (config.layer_dropout is not None) == ("dropout" in name)


def test_a_shallow_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 layers"):
        benchmark(parse_recipe(values(tmp_path, layers=4)), tmp_path / "run", 2)


def test_the_program_prints_tables_and_writes_all_numbers(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values(tmp_path)))
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "train.benchmark",
        str(recipe),
        "--steps",
        "2",
        "--output_dir",
        str(output),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((output / "training-cost.json").read_text())
    lines = {line["name"]: line for line in report["timings"]}
    assert list(lines) == [*variants(8, 2), TRAINER]
    assert all(len(line["seconds"]) == 2 for line in lines.values())
    assert (
        lines[PLAIN]["ratio"]["value"] == lines[PLAIN]["flops_ratio"] == lines[TRAINER]["flops_ratio"] == 1.0
    )
    assert lines["exits R=2"]["flops_ratio"] > 1 > lines["dropout 0.5"]["flops_ratio"]
    assert [line["exits"] for line in report["memory"]] == [0, 1, 2]
    for name in lines:
        assert name in done.stdout
    assert "peak memory" in done.stdout
