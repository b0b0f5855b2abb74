"""What changes over a run, as a small plot of characters: layers from top to bottom, steps from left to right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

Values = Callable[[int], Sequence[float]]  # optimizer step -> a number for each row

COLUMNS = 60
ROWS = 12
SAMPLES = 64  # steps that a column looks at, at most
SHADES, PLAIN_SHADES = " ░▒▓█", " .:*#"


def heatmap(values: Values, steps: range, *, shades: str = SHADES, rows: int = ROWS) -> list[str]:
    """A line for each of at most `rows` evenly spaced layers, first and last among them, and one with the steps.

    A character is the mean over the steps that it stands for, relative to the largest in the plot; what is more
    than zero is never blank. The largest value stands in the last line.
    """
    table = [_mean(values, part) for part in _parts(steps)]  # [columns][layers]
    top = max((value for column in table for value in column), default=0.0)
    layers = len(table[0])
    rows = min(rows, layers)
    shown = [1 + round(index * (layers - 1) / max(rows - 1, 1)) for index in range(rows)]
    lines = [
        f"{layer:>5} |{''.join(_shade(column[layer - 1], top, shades) for column in table)}|"
        for layer in shown
    ]
    ends, darkest = f"step {steps.start:,} to {steps[-1]:,}", f"darkest: {top:.3g}"
    return [*lines, f"{'':>6} {ends}  {darkest:>{max(len(table) - len(ends) - 2, 0)}}"]


def rotates(values: Values, steps: range) -> bool:
    """Whether something goes up and down within the first steps, which a plot of the whole run cannot show."""
    for layer in zip(*(values(step) for step in steps[:COLUMNS]), strict=True):
        jumps = [abs(a - b) > 0.5 * max(layer) for a, b in pairwise(layer)]
        if sum(jumps) >= 2:
            return True
    return False


def _parts(steps: range) -> Iterable[range]:
    """The steps of each column: as many columns as there are steps, or COLUMNS."""
    count = min(COLUMNS, len(steps))
    bounds = [index * len(steps) // count for index in range(count + 1)]
    return [steps[begin:end] for begin, end in pairwise(bounds)]


def _mean(values: Values, part: range) -> list[float]:
    """Over neighbouring steps, so that whatever rotates from step to step is seen in its turn."""
    sampled = [values(step) for step in part[:SAMPLES]]
    return [sum(layer) / len(sampled) for layer in zip(*sampled, strict=True)]


def _shade(value: float, top: float, shades: str) -> str:
    if value <= 0.0:
        return shades[0]
    return shades[min(1 + int(value / top * (len(shades) - 1)), len(shades) - 1)]
