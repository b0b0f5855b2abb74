"""Metrics travel as (sum, count) pairs and are divided once, after the reduction over ranks."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]
"""name -> (sum, count) over the tokens, rows or steps that this process saw."""

Totals = dict[str, list[float]]
"""name -> [sum, count] over all ranks."""


class MetricSums:
    """Running sums of metrics, on the device, without a host synchronisation until `reduce`."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor | float]] = {}

    def add(self, metrics: Metrics) -> None:
        """Add one forward's pairs."""
        for name, (total, count) in metrics.items():
            old = self._sums.get(name, [0.0, 0.0])
            self._sums[name] = [old[0] + _precise(total), old[1] + _precise(count)]

    def totals(self, accelerator: Accelerator) -> Totals:
        """Sums and counts over everything added on every rank; names must be alike on all ranks."""
        names = sorted(self._sums)
        if not names:
            return {}
        flat = [float(value) for name in names for value in self._sums[name]]
        pairs = all_sum(accelerator, flat)
        return {name: list(pair) for name, *pair in zip(names, pairs[::2], pairs[1::2], strict=True)}

    def restore(self, totals: Totals, accelerator: Accelerator) -> None:
        """Begin with what an interrupted run had added, once over all ranks."""
        mine = 1.0 if accelerator.is_main_process else 0.0
        self._sums = {name: [total * mine, count * mine] for name, (total, count) in totals.items()}

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over everything added on every rank since the last call, and begin anew.

        A metric that counted nothing is left out.
        """
        totals = self.totals(accelerator)
        self._sums = {}
        return {name: total / count for name, (total, count) in totals.items() if count}


def _precise(value: Tensor | float) -> Tensor | float:
    """Without its graph, and in float64 where the device has it: sums over many batches lose nothing."""
    if not isinstance(value, Tensor):
        return value
    return value.detach() if value.device.type == "mps" else value.detach().double()


def all_sum(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Sums over all ranks, in float64 where the device has it."""
    if accelerator.num_processes == 1:
        return values  # no round trip to the device, which the host would wait for
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=accelerator.device)
    return accelerator.reduce(tensor, reduction="sum").tolist()
