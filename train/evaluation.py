"""Measuring the model in training on held-out data."""

from __future__ import annotations

import torch

from train.data.batches import cut_for_rank, evaluation_batches
from train.metrics import MetricSums
from train.objectives.base import Batch
from train.progress import track
from train.run import Run


@torch.no_grad()
def evaluate(run: Run, done: int) -> dict[str, float]:
    """The objective's metrics on held-out data after `done` steps, named heldout/..., with bits per byte.

    Bits per byte are bits per predicted token, times the predicted tokens of all held-out data over the bytes of
    their text; of examples those are the answers.
    """
    accelerator, heldout = run.accelerator, run.data.heldout
    run.module.eval()
    sums = MetricSums()
    rank, world = accelerator.process_index, accelerator.num_processes
    rows, limit = run.heldout_rows, run.recipe.evaluate.sequences
    number = len(cut_for_rank(min(limit or len(rows), len(rows)), run.micro, rank, world))
    batches = evaluation_batches(rows, run.micro, rank, world, limit)
    for batch in track(run.log, "held out", batches, number):
        denominators = dict.fromkeys(run.objective.count(batch), 1.0)
        sums.add(run.module(to_device(batch, accelerator.device), done, denominators)[1])
    metrics = sums.reduce(accelerator)
    if "bits_per_token" in metrics:
        metrics["bits_per_byte"] = metrics.pop("bits_per_token") * heldout.predicted / heldout.bytes
    summary = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if "/" not in name)
    run.log.say(f"held out after step {done}: {summary}")
    return {f"heldout/{name}": value for name, value in metrics.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors to the device; row indexes become a list, for the host to decide by without waiting for it."""
    return {k: v.tolist() if k == "row" else v.to(device, non_blocking=True) for k, v in batch.items()}
