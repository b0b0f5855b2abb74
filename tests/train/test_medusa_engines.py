"""Medusa and Hydra on two gloo processes, under DDP, FSDP2 and ZeRO-3, learn what one process learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eval.target import open_run
from tests.train.engine_runs import SMALL_SHARD
from tests.train.test_engines import launch_engines
from tests.train.tiny_heads import medusa_values, write_base
from tests.train.tiny_runs import assert_close_logs, log_lines, write_recipe
from tests.train.tiny_runs import write_text as write_text_into
from train import features, parse_recipe, train

ENGINES = ("ddp", "fsdp2", "zero3")
JOINT: dict[str, Any] = {"stage": "joint", "self_distillation": True, "lambda_0": 0.1, "ramp": "sine"}
VARIANTS: dict[str, dict[str, Any]] = {
    "heads": {},
    "shared": {"objective": {"shared_projection": True, "layers": 2}},
    "stopped": {},
    "cached": {"features": {"dtype": "float32"}},
    "hydra": {"objective": {"kind": "hydra", "layers": 2, "shared_projection": True}},
    "hydra_plus": {"objective": {"kind": "hydra", "layers": 2, "prefix_attention": True}},
    "joint": {"model": {"lora": {"rank": 2}}, "objective": JOINT},
}
CHOOSING: dict[str, Any] = {
    "max_steps": 6,
    "checkpoint": {"every": 2, "keep": 9},
    "evaluate": {"decode": {"num_speculations": 3}},
}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every variant under every engine (VARIANT_ENGINE), of one launch, and on one process (VARIANT)."""
    folder = tmp_path_factory.mktemp("medusa")
    text = write_text_into(folder)
    base = write_base(folder / "base", text)
    first = train(parse_recipe(medusa_values(folder / "first", text, base, max_steps=2)))
    values = {}
    for name, changes in (VARIANTS | {"choosing": CHOOSING}).items():
        objective = dict(changes.get("objective", {}))
        if name == "joint":
            objective["init_heads"] = str(first)
        batch = {"sequences": 7, "length": 16, "micro": 2}  # uneven, and accumulated
        changes = changes | {"objective": objective, "batch": batch}
        if name == "cached":
            changes["features"] = changes["features"] | {"cache": str(folder / "kept")}
        values[name] = medusa_values(folder / name, text, base, **changes)
    paths = [str(write_recipe(folder / f"{name}.yaml", recipe)) for name, recipe in values.items()]
    launched = launch_engines(2, *ENGINES, "--", *paths)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, "SHARD_BYTES", SMALL_SHARD)
            for name in values.keys() - {"stopped"}:
                train(parse_recipe(values[name]))
        _, error = launched.communicate(timeout=400)  # a collective that does not match hangs
    finally:
        launched.kill()
    assert launched.returncode == 0, error[-4000:]
    return folder


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_learn_what_one_learns(variant: str, engine: str, runs: Path) -> None:
    one = runs / ("heads" if variant == "stopped" else variant)
    two = runs / f"{variant}_{engine}"
    assert_close_logs(two, one)
    for ours, theirs in zip(tensors(two), tensors(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", ["train", "heldout"])
def test_two_processes_keep_the_features_that_one_keeps(part: str, engine: str, runs: Path) -> None:
    """The same shards; under DDP, whose processes compute as one does, the same bytes."""
    one, two = runs / "kept" / part, runs / f"kept_{engine}" / part
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(names) > 2
    assert names == sorted(path.name for path in two.glob("*.safetensors"))
    for name in names:
        if engine == "ddp":
            assert (one / name).read_bytes() == (two / name).read_bytes()
        ours, theirs = load_file(two / name), load_file(one / name)
        assert torch.equal(ours["rows"], theirs["rows"])
        torch.testing.assert_close(ours["features"], theirs["features"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_export_the_checkpoint_that_drafts_best(engine: str, runs: Path) -> None:
    """By decodes where the heads are whole; sharded ones are compared teacher-forced."""
    run = runs / f"choosing_{engine}"
    by, name = ("decode", "decode") if engine == "ddp" else ("teacher-forced", "heldout")
    lengths = {
        line["step"]: line[f"{name}/acceptance_length"]
        for line in log_lines(run)
        if f"{name}/acceptance_length" in line
    }
    best = max(lengths, key=lambda step: (lengths[step], step))
    assert lengths.keys() == {2, 4, 6}
    told = json.loads((run / "run.json").read_text())["best"]
    assert told == {"step": best, "acceptance_length": lengths[best], "by": by}
    saved = load_file(runs / "choosing" / "checkpoints" / f"step-{best:08d}" / "trainable.safetensors")
    (heads,) = tensors(run)
    for head in range(3):
        name = f"{head}.0.linear.weight"
        ours, one = heads[name], saved[f"module.heads.blocks.{name}"]
        torch.testing.assert_close(ours, one, rtol=0.0, atol=TOLERANCE)


def tensors(run: Path) -> list[dict[str, torch.Tensor]]:
    """What a run exported: heads, and of a second stage the model."""
    files = open_run(run)
    assert files.heads is not None
    found = [load_file(next(files.heads.glob("*_lm_head.safetensors")))]
    if files.heads.name == "heads":
        found.append(load_file(files.model / "model.safetensors"))
    return found
