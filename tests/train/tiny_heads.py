"""Tiny runs that train heads: a checkpoint with its tokenizer to train them on, and a recipe of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import tiny_model
from tests.train.tiny_runs import recipe_values
from train.data.tokenizer import train_tokenizer


def write_base(directory: Path, text: Path, *, template: str | None = None, **changes: Any) -> Path:
    """A random model of four layers with a tokenizer made of the text; its directory."""
    tokenizer = train_tokenizer([path.read_text() for path in sorted(text.glob("*.txt"))], 280)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), **changes)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    return directory


def medusa_values(
    output_dir: Path, text: Path, base: Path, *, objective: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A recipe of four steps; `objective` extends its section, `changes` replace top-level keys."""
    return heads_values(output_dir, text, base, {"kind": "medusa", "heads": 3} | (objective or {}), **changes)


def heads_values(
    output_dir: Path, text: Path, base: Path, objective: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    """The same for the heads of any section."""
    model = {"name_or_path": str(base), "autocast": "float32"} | changes.pop("model", {})
    return recipe_values(output_dir, text, model=model, objective=objective, **changes)
