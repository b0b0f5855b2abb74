"""One valid recipe as nested dicts, for tests that change a value of it; nothing of it has to exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.config import Recipe, parse_recipe


def small_values(**changes: Any) -> dict[str, Any]:
    """A new copy each time; `changes` replace top-level keys."""
    values: dict[str, Any] = {
        "output_dir": "out",
        "max_steps": 4,
        "batch": {"sequences": 8, "length": 16},
        "model": {
            "config": {
                "model_type": "llama",
                "num_hidden_layers": 3,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 32,
            },
            "tokenizer": {"train": {"vocab_size": 280}},
            "autocast": "float32",
        },
        "data": {"train": [{"kind": "text", "files": ["*.txt"]}], "heldout": 0.2},
        "objective": {
            "kind": "layerskip",
            "layer_dropout": {"p_max": 0.1},
            "early_exit": {"curriculum": "rotational", "every": 2},
        },
        "optimizer": {"kind": "adamw", "lr": 0.005, "clip_norm": 0.5},
        "schedule": {"warmup_steps": 2},
        "log": {"every": 1},
    }
    return values | changes


def small_recipe(**changes: Any) -> Recipe[Any]:
    """`small_values`, checked."""
    return parse_recipe(small_values(**changes))


def write_documents(directory: Path, number: int = 12) -> list[str]:
    """Small text files in a directory; the pattern of a recipe's `files` that matches them."""
    for i in range(number):
        (directory / f"{i:02}.txt").write_text(f"def f{i}(x):\n    return x + {i} * {i * i}\n" * 8)
    return [f"{directory}/*.txt"]
