"""The report's figures, drawn by matplotlib without a display.

Axes and text are drawn in INK and every mark in a colour-blind-safe colour that reads on white and on black,
so that `to_svg` can hand the ink over to the page (`currentColor`) and one figure serves light and dark.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.results import ExitQuality, StrategyResult, TrainingPoint
from eval.statistics import Estimate
from eval.titles import marked

INK = "#1f2937"
LABEL_WIDTH, TITLE_WIDTH = 32, 48  # characters of a line
BLUE, ORANGE, GREY = "#2b83c6", "#d9731a", "#8a8f98"
STYLE: Any = {
    "svg.hashsalt": "report",  # the same numbers give the same file
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "hatch.linewidth": 1.0,
}


def to_svg(figure: Figure) -> str:
    """An <svg> element for the inside of a page: transparent, no prolog, no metadata, the page's ink."""
    text = io.StringIO()
    with rc_context(STYLE):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


@rc_context(STYLE)
def plot_exits(exits: Sequence[ExitQuality], path: Path) -> None:
    """Writes `exits_figure` to a PNG or SVG file, by its suffix, on white."""
    exits_figure(exits).savefig(path, dpi=150, facecolor="white")


@rc_context(STYLE)
def training_figure(points: Sequence[TrainingPoint]) -> Figure:
    """The training loss over optimizer steps and, where measured, each exit's held-out cross entropy."""
    layers = sorted({layer for point in points for layer in point.heldout or {}})
    axes = _panels(2 if layers else 1, height=3.0)
    axes[0].plot([p.step for p in points], [p.loss for p in points], color=BLUE, linewidth=1.2)
    axes[0].set(title="Training loss", xlabel="optimizer step", ylabel="loss")
    axes[0].grid(axis="y")
    if layers:
        _heldout(axes[1], points, layers)
    return _figure(axes[0])


def _heldout(axes: Axes, points: Sequence[TrainingPoint], layers: Sequence[int]) -> None:
    ends: dict[int, tuple[int, float]] = {}
    colours = {layer: ORANGE if layer == layers[-1] else BLUE for layer in layers}
    for layer in layers:
        curve = [(p.step, p.heldout[layer]) for p in points if p.heldout and layer in p.heldout]
        curve = [point for point in curve if np.isfinite(point[1])]
        if curve:
            axes.plot(*zip(*curve, strict=True), color=colours[layer], linewidth=1.2)
            axes.plot(*curve[-1], "o", color=colours[layer], markersize=3)
            ends[layer] = curve[-1]
    axes.set(title="Held-out cross entropy after layer", xlabel="optimizer step", ylabel="nats per token")
    axes.grid(axis="y")
    low, high = axes.get_ylim()
    gap = (high - low) / 15
    heights = _spread([y for _, y in ends.values()], gap)
    axes.set_ylim(bottom=min([low, *(height - gap for height in heights)]))
    aside = 0.05 * max((step for step, _ in ends.values()), default=0) or 1
    for (layer, (x, y)), height in zip(ends.items(), heights, strict=True):
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 2}
        style: Any = {"va": "center", "fontsize": 8, "color": colours[layer], "arrowprops": line}
        axes.annotate(f"{layer}", (x, y), xytext=(x + aside, height), **style)


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """The values, moved as little as possible (least squares) to lie at least `gap` apart."""
    order = np.argsort(values, kind="stable")
    blocks: list[tuple[float, int]] = []  # mean and size; in a block the gaps are exact
    for rank, index in enumerate(order):
        mean, size = values[index] - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            below, count = blocks.pop()
            mean, size = (below * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    heights = [mean for mean, size in blocks for _ in range(size)]
    moved = [0.0] * len(values)
    for rank, index in enumerate(order):
        moved[index] = heights[rank] + rank * gap
    return moved


@rc_context(STYLE)
def exits_figure(exits: Sequence[ExitQuality]) -> Figure:
    """Cross entropy, and top-1 accuracy and agreement with the last layer, over the exit layer."""
    exits = sorted(exits, key=lambda e: e.layer)
    layers = [e.layer for e in exits]
    left, right = _panels(2, height=3.0)
    left.plot(layers, [e.cross_entropy for e in exits], "o-", color=BLUE, markersize=4)
    left.set(title="Cross entropy on held-out text", ylabel="nats per token")
    for name, values, colour, mark in (
        ("agrees with the last layer", [e.agreement for e in exits], BLUE, "o-"),
        ("matches the text (top-1)", [e.top1 for e in exits], ORANGE, "s-"),
    ):
        right.plot(layers, [100 * v for v in values], mark, color=colour, markersize=4, label=name)
    right.set(title="Best token after each exit", ylabel="% of positions", ylim=(0, 103))
    right.legend(frameon=False, loc="best", labelcolor="linecolor")
    for axes in (left, right):
        axes.set_xlabel("exit layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
    return _figure(left)


@rc_context(STYLE)
def speed_figure(strategies: Sequence[StrategyResult]) -> Figure:
    """Tokens per second and, where there is one, the median speedup per strategy, with 95 % intervals."""
    has_speedup = any(s.speedup_median for s in strategies)
    names = [fill(marked(s), LABEL_WIDTH) for s in strategies]
    row = max(0.42, 0.15 + 0.15 * max(1 + name.count("\n") for name in names))  # inches
    axes = _panels(2 if has_speedup else 1, height=1.1 + row * len(strategies), sharey=True)
    rates = [s.tokens_per_second for s in strategies]
    _bars(axes[0], strategies, rates, "{:.0f}" if max(r.value for r in rates if r) >= 100 else "{:.1f}")
    axes[0].set(title="Speed", xlabel="tokens per second")
    axes[0].set_yticks(range(len(strategies)), names)
    axes[0].invert_yaxis()
    if has_speedup:
        axes[1].axvline(1, color=INK, linewidth=1, linestyle=":")
        _bars(axes[1], strategies, [s.speedup_median for s in strategies], "{:.2f}x")
        axes[1].set(title="Speedup over the baseline", xlabel="median ratio of tokens per second")
    return _figure(axes[0])


def _bars(
    axes: Axes, strategies: Sequence[StrategyResult], values: Sequence[Estimate | None], form: str
) -> None:
    for row, (strategy, estimate) in enumerate(zip(strategies, values, strict=True)):
        if estimate is None:
            continue
        colour = BLUE if strategy.lossless else ORANGE
        axes.barh(
            row, estimate.value, 0.6, color=colour, alpha=0.85, hatch=None if strategy.lossless else "//"
        )
        axes.plot([estimate.low, estimate.high], [row, row], color=INK, linewidth=1.2)
        end = max(estimate.value, estimate.high)
        axes.annotate(
            form.format(estimate.value), (end, row), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)


@rc_context(STYLE)
def accepted_lengths_figure(strategies: Sequence[StrategyResult]) -> Figure:
    """For each strategy the share of target forwards that gained 1, 2, ... tokens, and their mean."""
    lengths = [[n for p in s.prompts for n in p.accepted_lengths] for s in strategies]
    longest = max(max(values) for values in lengths)
    axes = _panels(len(strategies), height=2.2, sharex=True, sharey=True)
    for panel, strategy, values in zip(axes, strategies, lengths, strict=True):
        shares = np.bincount(values, minlength=longest + 1)[1:] / len(values)
        panel.bar(range(1, longest + 1), 100 * shares, 0.8, color=BLUE if strategy.lossless else ORANGE)
        mean = float(np.mean(values))
        panel.axvline(mean, color=INK, linewidth=1, linestyle=":")
        panel.set_title(fill(f"{marked(strategy)}, mean\N{NO-BREAK SPACE}{mean:.2f}", TITLE_WIDTH))
        panel.set_xlabel("tokens per target forward")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(labelbottom=True)
        panel.grid(axis="y")
    for panel in axes[::2]:
        panel.set_ylabel("% of forwards")
    return _figure(axes[0])


def _panels(count: int, height: float, sharex: bool = False, sharey: bool = False) -> list[Axes]:
    """`count` axes, two in a row, on one figure; height in inches for each row."""
    rows, columns = (count + 1) // 2, min(count, 2)
    figure = Figure(figsize=(8.8 if columns == 2 else 6.0, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).ravel()
    for unused in grid[count:]:
        unused.remove()
    return list(grid[:count])


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure
