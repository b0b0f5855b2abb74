"""The peak memory of a training step, with 0, 1, 2, ... exits on."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.config import Recipe
from train.live_bytes import LiveBytes
from train.loop import train_step
from train.metrics import MetricSums
from train.objectives.base import Batch
from train.objectives.layerskip import EarlyExitConfig, LayerSkipConfig
from train.processes import join
from train.run import set_up


@dataclass(frozen=True)
class StepMemory:
    """Bytes. `resident` is there between steps: weights and optimizer state. `peak` contains it."""

    exits: int  # early ones; none is plain training with the same loss
    peak: int
    resident: int


def memory_of_steps(
    recipe: Recipe[Any], directory: Path, most_exits: int, batches: list[list[Batch]]
) -> list[StepMemory]:
    """The second step of plain training and with 1 to `most_exits` exits spread over the depth, one after the other."""
    return [_memory_of_step(recipe, directory, number, batches) for number in range(most_exits + 1)]


def with_exits(recipe: Recipe[Any], number: int) -> LayerSkipConfig:
    """An objective with so many early exits, always on."""
    if number == 0:
        return LayerSkipConfig(kind="layerskip")
    assert recipe.model.config is not None
    num_layers = recipe.model.config["num_hidden_layers"]
    exits = [num_layers * (place + 1) // (number + 1) for place in range(number)]
    return LayerSkipConfig(kind="layerskip", early_exit=EarlyExitConfig(exits=exits, weights="uniform"))


def _memory_of_step(
    recipe: Recipe[Any], directory: Path, exits: int, batches: list[list[Batch]]
) -> StepMemory:
    """On CUDA by torch's allocator, less what was there before; elsewhere by counting tensors."""
    gc.collect()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    run = set_up(recipe.model_copy(update={"objective": with_exits(recipe, exits)}), directory, join())
    sums = MetricSums()
    train_step(run, 0, batches[0], sums, stop_requested=False)
    device = run.accelerator.device
    if device.type == "cuda":
        resident = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        train_step(run, 1, batches[1], sums, stop_requested=False)
        return StepMemory(exits, torch.cuda.max_memory_allocated(device) - before, resident - before)
    state = (value for values in run.optimizer.state.values() for value in values.values())
    tensors = chain(run.module.parameters(), run.module.buffers(), state)
    with LiveBytes(tensor for tensor in tensors if isinstance(tensor, Tensor)) as live:
        resident = live.now
        train_step(run, 1, batches[1], sums, stop_requested=False)
    return StepMemory(exits, live.peak, resident)
