"""The benchmark of training, on a recipe for heads: what it prints and writes; the figures themselves are no test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerskip_model import head_map
from tests.train.tiny_heads import heads_values, medusa_values, write_base
from tests.train.tiny_runs import start, write_recipe, write_text
from train import parse_recipe
from train.heads_benchmark import show_heads, time_heads


def test_heads_are_timed_beside_the_frozen_forward(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    base = write_base(tmp_path / "base", text)
    batch = {"sequences": 4, "length": 16, "micro": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", medusa_values(tmp_path / "run", text, base, batch=batch))
    output = tmp_path / "cost"
    process = start("-m", "train.benchmark", str(recipe), "--steps", "3", "--output_dir", str(output))
    told, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    assert "step over what that predicts" in told
    found = json.loads((output / "training-cost.json").read_text())
    assert len(found["forward"]) == len(found["step"]) == len(found["update"]) == 3
    assert all(0.0 < update < step for update, step in zip(found["update"], found["step"], strict=True))
    # Forward: 4 layers of 32 x 32 (q, o), 2 of 32 x 16 (k, v), 3 of 32 x 48, and attention over the square of 16.
    layer = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 4 * 4 * 8 * 16
    counts = [4 * (16 - k) for k in (1, 2, 3)]
    heads = 3 * 4 * 32 * 32 * counts[0] + 6 * 280 * 32 * sum(counts)
    assert found["flops_ratio"] == 1 + heads / (4 * 16 * 4 * layer)
    assert found["predicted"] > found["flops_ratio"]


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_eagle_heads_are_timed_too(kind: str, tmp_path: Path) -> None:
    """The layer in every step, its LM head for what counts, and once the target's."""
    text = write_text(tmp_path)
    base = write_base(tmp_path / "base", text)
    method: dict[str, Any] = {"kind": kind, "steps": 2}
    if kind == "eagle3":
        method["feature_layers"] = [1, 2, 3]
    batch = {"sequences": 4, "length": 16, "micro": 2}
    values = heads_values(tmp_path / "run", text, base, method, batch=batch)
    found, _ = time_heads(parse_recipe(values), tmp_path / "cost", 1)
    weights, attention = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48, 12 * 4 * 8 * 16
    counts = [4 * (16 - k) for k in (1, 2)]
    if kind == "eagle":
        head = 4 * 16 * (4 * 2 * 32 * 32 + 6 * weights + attention) + 6 * 280 * 32 * counts[0]
    else:
        wide = 32 * 32 + 2 * 32 * 16  # what q, k and v have more of
        layers = 2 * (6 * (weights + wide) + attention)
        head = 4 * 16 * (4 * 3 * 32 * 32 + layers) + (6 * sum(counts) + 2 * counts[0]) * 280 * 32
    expected = 1 + head / (4 * 16 * 4 * (2 * weights + attention / 3))
    assert found.flops_ratio == pytest.approx(expected, rel=1e-12)


def test_hydra_heads_are_timed_too(tmp_path: Path) -> None:
    """With all that theirs cost: the prefix layer, the blocks, the projections and the teacher's LM head."""
    text = write_text(tmp_path)
    base = write_base(tmp_path / "base", text)
    plus = {"kind": "hydra", "heads": 2, "layers": 2, "prefix_attention": True}
    values = medusa_values(tmp_path / "run", text, base, objective=plus, batch={"sequences": 4, "length": 16})
    found, _ = time_heads(parse_recipe(values), tmp_path / "cost", 1)
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    prefix = 4 * 16 * (6 * weights + 12 * 4 * 8 * 16)
    counts = [4 * (16 - k) for k in (1, 2)]
    blocks = 6 * (2 * (2 + 3) + 2) * 32 * 32 * counts[0]
    heads = prefix + blocks + (6 + 2) * 280 * 32 * sum(counts)
    assert found.flops_ratio == 1 + heads / (4 * 16 * 4 * (2 * weights + 4 * 4 * 8 * 16))


def test_the_memory_of_an_eagle3_head_goes_by_steps_and_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(head_map, "CPU_CHUNK_BYTES", 2**13)
    text = write_text(tmp_path)
    base = write_base(tmp_path / "base", text)
    method = {"kind": "eagle3", "steps": 8, "feature_layers": [1, 2, 3]}
    batch = {"sequences": 4, "length": 96}
    values = heads_values(tmp_path / "run", text, base, method, batch=batch)
    found, run = time_heads(parse_recipe(values), tmp_path / "cost", 1)
    whole, fewer, shorter = found.memory
    assert (whole.steps, whole.tokens, fewer.steps, shorter.tokens) == (8, 4 * 96, 4, 2 * 96)
    assert fewer.added / whole.added == pytest.approx(0.5, abs=0.07)
    assert shorter.added / whole.added == pytest.approx(0.5, abs=0.07)
    show_heads(found, run)
    assert "4 steps of 384 tokens: 0.5" in capsys.readouterr().out
