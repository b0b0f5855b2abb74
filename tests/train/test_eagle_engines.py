"""EAGLE and EAGLE-3 on two gloo processes, under DDP, FSDP2, ZeRO-2 and ZeRO-3, learn what one process learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eval.target import open_run
from tests.train.test_engines import launch_engines
from tests.train.tiny_heads import heads_values, write_base
from tests.train.tiny_runs import assert_close_logs, write_recipe
from tests.train.tiny_runs import write_text as write_text_into
from train import parse_recipe, train

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
EAGLE: dict[str, Any] = {"kind": "eagle", "steps": 2, "noise": 0.5}
EAGLE3: dict[str, Any] = {"kind": "eagle3", "steps": 3, "feature_layers": [1, 2, 3], "draft_vocab_size": 120}
VARIANTS: dict[str, dict[str, Any]] = {
    "eagle": {"objective": EAGLE},
    "eagle3_stopped": {"objective": EAGLE3},
}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every variant under every engine (VARIANT_ENGINE), of one launch, and on one process (VARIANT)."""
    folder = tmp_path_factory.mktemp("eagle")
    text = write_text_into(folder)
    base = write_base(folder / "base", text, tie_word_embeddings=True)
    values = {}
    for name, changes in VARIANTS.items():
        batch = {"sequences": 7, "length": 16, "micro": 2}  # uneven, and accumulated
        values[name] = heads_values(folder / name, text, base, batch=batch, **changes)
    paths = [str(write_recipe(folder / f"{name}.yaml", recipe)) for name, recipe in values.items()]
    launched = launch_engines(2, *ENGINES, "--", *paths)
    try:
        for name in VARIANTS:
            train(parse_recipe(values[name]))
        _, error = launched.communicate(timeout=400)  # a collective that does not match hangs
    finally:
        launched.kill()
    assert launched.returncode == 0, error[-4000:]
    return folder


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_learn_what_one_learns(variant: str, engine: str, runs: Path) -> None:
    """The noise included, which belongs to a row, and the reduced vocabulary, which belongs to the data."""
    one, two = runs / variant, runs / f"{variant}_{engine}"
    assert_close_logs(two, one)
    ours, theirs = head_of(two), head_of(one)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=TOLERANCE)


def head_of(run: Path) -> dict[str, torch.Tensor]:
    """What a run exported."""
    folder = open_run(run).heads
    assert folder is not None
    return load_file(folder / "model.safetensors")
