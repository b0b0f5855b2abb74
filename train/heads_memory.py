"""What an EAGLE-3 head in training keeps, by the steps and the tokens that it is trained for.

Part of `python -m train.benchmark`: memory grows with steps x tokens x hidden size, and not with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.evaluation import to_device
from train.live_bytes import LiveBytes
from train.objectives.base import Batch
from train.objectives.eagle3 import Eagle3
from train.run import Run

CUT = ("input_ids", "labels", "position_ids", "features")  # of a batch, what has a place for each token


@dataclass(frozen=True)
class HeadMemory:
    """`added`: bytes at the peak of a forward and backward of the head, beyond the weights; gradients are in it."""

    steps: int
    tokens: int
    added: int


def memory_of_head(run: Run, batch: Batch) -> list[HeadMemory]:
    """All steps over a whole micro-batch; half the steps; half the tokens. Nothing for other heads than EAGLE-3's."""
    objective = run.objective
    if not isinstance(objective, Eagle3):
        return []
    moved = to_device(batch, run.accelerator.device)
    objective.train()
    with torch.no_grad(), run.accelerator.autocast():
        moved["features"] = objective.states(moved)  # so that the frozen model is no part of it
    steps, length = objective.config.steps, run.recipe.batch.length
    return [
        _memory(run, objective, moved, some_steps, some_length)
        for some_steps, some_length in ((steps, length), (steps // 2, length), (steps, length // 2))
        if 0 < some_steps < some_length - 1
    ]


def _memory(run: Run, objective: Eagle3, batch: Batch, steps: int, length: int) -> HeadMemory:
    module = objective.module
    cut = {key: batch[key][:, :length] for key in CUT if key in batch}
    inputs, labels = cut.pop("input_ids"), cut.pop("labels")

    def work() -> None:
        with run.accelerator.autocast():
            found = module(inputs, labels, objective.weights[:steps], **cut)
        found.total.backward()

    whole, module.steps = module.steps, steps
    try:
        work()  # what is made once is there
        module.zero_grad()
        added = added_at_peak(work, [*module.parameters(), *module.buffers(), *batch_tensors(batch)])
    finally:
        module.steps = whole
        module.zero_grad()
    return HeadMemory(steps, inputs.numel(), added)


def batch_tensors(batch: Batch) -> list[Tensor]:
    """Those of a batch."""
    return [value for value in batch.values() if isinstance(value, Tensor)]


def added_at_peak(work: Callable[[], None], there: Iterable[Tensor]) -> int:
    """Bytes beyond those of the tensors that are `there`: by torch's allocator on CUDA, elsewhere by counting."""
    there = list(there)
    device = there[0].device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes(there) as live:
        before = live.now
        work()
    return live.peak - before


def memory_in_words(found: list[HeadMemory], hidden: int, vocabulary: int) -> list[str]:
    """A line for each, beside the first."""
    if not found:
        return []
    first, *others = found
    unit = 4 * first.steps * first.tokens
    lines = [
        f"memory of the head's step beyond weights: {first.added / 1e6:.1f} MB for {first.steps} steps of "
        f"{first.tokens:,} tokens, {first.added / (unit * hidden):.1f} x steps x tokens x hidden size in float32; "
        f"their logits would be {unit * vocabulary / 1e6:.1f} MB"
    ]
    for other in others:
        lines.append(
            f"{other.steps} steps of {other.tokens:,} tokens: {other.added / first.added:.3f} of it, "
            f"{other.steps * other.tokens / (first.steps * first.tokens):.3f} by steps x tokens"
        )
    return lines
