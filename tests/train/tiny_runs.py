"""Tiny training runs: a recipe of seconds, ways to run it, and what it left."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from train import loop
from train.config import Recipe, parse_recipe

ROOT = Path(__file__).parents[2]
TIMING = {"tokens_per_second", "mfu", "peak_memory_bytes", "seconds_left"}

# Another order of summation changes a float32 gradient by a few units of 2^-24 = 6e-8 of its largest terms, and
# AdamW divides it by its own size: with eps 1e-4, near the size of these gradients, an update moves by no more
# than lr * 1e-3 where the gradient is all rounding. A wrong denominator or a dropped row moves it by lr.
EQUAL_ADAMW = {"kind": "adamw", "lr": 0.005, "eps": 1e-4, "clip_norm": 0.5}
WEIGHT_TOLERANCE = 2e-5
LOSS_TOLERANCE = 1e-5


def write_text(directory: Path) -> Path:
    """Files of made-up text that a small model can learn, for training and to be held out; their directory."""
    words = [f"{a}{b}" for a in ("lo", "ra", "mi", "tu", "se") for b in ("ko", "na", "di", "fu")]
    draw = random.Random(0)
    for name in ("train_0", "train_1", "heldout_0", "heldout_1"):
        lines = [" ".join(draw.choice(words) for _ in range(draw.randint(3, 9))) for _ in range(60)]
        (directory / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return directory


def recipe_values(output_dir: Path, text: Path | str, **changes: Any) -> dict[str, Any]:
    """A recipe as nested dicts; `changes` replace top-level keys. Layer dropout and the curriculum are on."""
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "batch": {"sequences": 8, "length": 16},
        "model": {
            "config": {
                "model_type": "llama",
                "num_hidden_layers": 4,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 32,
            },
            "tokenizer": {"train": {"vocab_size": 280}},
            "autocast": "float32",
        },
        "data": {
            "train": [{"kind": "text", "files": [f"{text}/train_*.txt"]}],
            "heldout": [{"kind": "text", "files": [f"{text}/heldout_*.txt"]}],
        },
        "objective": {
            "kind": "layerskip",
            "layer_dropout": {"p_max": 0.6},
            "early_exit": {"curriculum": "rotational", "every": 2},
        },
        "optimizer": EQUAL_ADAMW,
        "schedule": {"warmup_steps": 1},
        "log": {"every": 1},
    }
    return values | changes


def tiny_recipe(output_dir: Path, text: Path | str, **changes: Any) -> Recipe[Any]:
    """`recipe_values`, checked."""
    return parse_recipe(recipe_values(output_dir, text, **changes))


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    """A recipe as a YAML file."""
    path.write_text(yaml.safe_dump(values))
    return path


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    """Start `python COMMAND` in the repository, offline, with as many threads as here."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "PASSIVE"}
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | threads | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch_two(*module: str) -> subprocess.Popen[str]:
    """Start `torchrun --nproc_per_node 2 -m MODULE`."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return start(*launcher, "-m", *module, OMP_NUM_THREADS="1")


def log_lines(directory: Path) -> list[dict[str, Any]]:
    """log.jsonl without what a clock decides."""
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def exported(directory: Path) -> dict[str, torch.Tensor]:
    """The weights that a run exported."""
    return load_file(directory / "export" / "model.safetensors")


def assert_equal_weights(left: Path, right: Path) -> None:
    """Bit for bit."""
    ours, theirs = exported(left), exported(right)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_close_weights(left: Path, right: Path) -> None:
    """Equal up to float32 rounding, for runs with the optimizer EQUAL_ADAMW."""
    ours, theirs = exported(left), exported(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=WEIGHT_TOLERANCE)


def assert_close_logs(left: Path, right: Path) -> None:
    """The same steps and metrics, values equal up to float32 rounding."""
    for ours, theirs in zip(log_lines(left), log_lines(right), strict=True):
        assert ours == pytest.approx(theirs, rel=LOSS_TOLERANCE)


@contextmanager
def at_step(step: int, event: Any) -> Iterator[None]:
    """Call `event` once, when optimizer step `step` has just begun; a wish to stop is seen by the next."""
    original = loop.train_step
    pending = [event]

    def patched(run: Any, now: int, *rest: Any) -> Any:
        if now == step and pending:
            pending.pop()()
        return original(run, now, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", patched)
        yield
