"""Metrics travel as (sum, count) pairs and are divided once, after the reduction over ranks."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]
"""name -> (sum, count) over the tokens, rows or steps that this process saw."""


class MetricSums:
    """Running sums of metrics, on the device, without a host synchronisation until `reduce`."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor | float]] = {}

    def add(self, metrics: Metrics) -> None:
        """Add one forward's pairs."""
        for name, (total, count) in metrics.items():
            total = total.detach() if isinstance(total, Tensor) else total
            old = self._sums.get(name, [0.0, 0.0])
            self._sums[name] = [old[0] + total, old[1] + count]

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over everything added on every rank since the last call; names must be alike on all ranks.

        A metric that counted nothing is left out.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        flat = [float(value) for name in names for value in self._sums[name]]
        pairs = all_sum(accelerator, flat)
        self._sums = {}
        return {
            name: total / count
            for name, total, count in zip(names, pairs[::2], pairs[1::2], strict=True)
            if count
        }


def all_sum(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Sums over all ranks, in float64 where the device has it."""
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=accelerator.device)
    return accelerator.reduce(tensor, reduction="sum").tolist()
