"""A whole run that trains adapters of a checkpoint: the base stays, the export is plain and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import tiny_model
from tests.train.tiny_runs import exported, recipe_values, start, write_recipe, write_text
from train.checkpoint import list_checkpoints
from train.data.tokenizer import train_tokenizer


def values(tmp_path: Path) -> dict[str, Any]:
    """Adapters on a base in bfloat16, with dropout, which draws from torch's generator."""
    base = tmp_path / "base"
    if not base.exists():
        text = write_text(tmp_path)
        tokenizer = train_tokenizer([path.read_text() for path in sorted(text.glob("*.txt"))], 280)
        tokenizer.save_pretrained(base)
        tiny_model(dtype=torch.bfloat16, vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(
            base
        )
    model = {
        "name_or_path": str(base),
        "dtype": "bfloat16",
        "autocast": "float32",
        "lora": {"rank": 2, "dropout": 0.2, "targets": ["q_proj", "v_proj", "down_proj"]},
    }
    adamw = {"kind": "adamw", "lr": 0.02}
    return recipe_values(
        tmp_path / "run", tmp_path, model=model, optimizer=adamw, checkpoint={"every": 2, "keep": 9}
    )


def test_the_program_trains_adapters_and_exports_the_merged_model(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", values(tmp_path))
    process = start("-m", "train", str(recipe))
    _, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    run = tmp_path / "run"
    weights, base = exported(run), AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert set(weights) == set(base) - {"lm_head.weight"}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}  # as the checkpoint stores them
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, base[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "down_proj"}
    newest = list_checkpoints(run / "checkpoints")[-1]
    size = (newest / "trainable.safetensors").stat().st_size
    assert size < 0.5 * sum(2 * tensor.numel() for tensor in base.values())  # only what trains

    # Stopped after step 2 and gone on with, it is the same.
    for path in list_checkpoints(run / "checkpoints")[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (run / "run.json").unlink()
    process = start("-m", "train", str(recipe))
    _, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    assert "going on after step 2" in error
    assert all(torch.equal(tensor, weights[name]) for name, tensor in exported(run).items())
