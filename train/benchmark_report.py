"""The tables of `python -m train.benchmark`."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from train.benchmark import Report

MIB = 2**20
NOTE = (
    "flops: matrix products of forward and backward. predicted: that ratio with the update ({update:.1f} ms, the same "
    "everywhere) counted by its time. Softmaxes, norms and activations are in the times alone, and small models "
    "show it: an exit's softmax over the vocabulary is no matrix product."
)


def show(report: Report) -> None:
    """Print both tables and what the columns mean."""
    console = Console(highlight=False)
    console.print(_timings(report))
    console.print(NOTE.format(update=1e3 * report.update_seconds))
    console.print(_memory(report))
    console.print("  ".join(f"{k}: {v}" for k, v in report.environment.items() if isinstance(v, str | int)))


def _timings(report: Report) -> Table:
    table = Table(
        title="training steps, each timed once a round, all in one process", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    table.add_column("", no_wrap=True)
    for heading in ("ms", "over plain (95 %)", "flops", "predicted", "over it"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in report.timings:
        ratio = line.ratio
        table.add_row(
            line.name,
            f"{1e3 * median(line.seconds):.1f}",
            f"{ratio.value:.3f} ({ratio.low:.3f}, {ratio.high:.3f})",
            f"{line.flops_ratio:.3f}",
            f"{line.predicted:.3f}",
            f"{ratio.value / line.predicted:.3f}",
        )
    return table


def _memory(report: Report) -> Table:
    table = Table(
        title="peak memory of a step; plain training has the same chunked loss",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for heading in ("exits on", "peak MiB", "over plain", "MiB less weights, optimizer", "over plain"):
        table.add_column(heading, justify="right")
    plain = report.memory[0]
    for line in report.memory:
        added = line.peak - line.resident
        table.add_row(
            str(line.exits) if line.exits else "plain",
            f"{line.peak / MIB:.1f}",
            f"{line.peak / plain.peak:.3f}",
            f"{added / MIB:.1f}",
            f"{added / (plain.peak - plain.resident):.3f}",
        )
    return table
