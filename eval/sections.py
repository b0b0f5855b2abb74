"""What a report says, section by section, before it becomes Markdown, HTML or a terminal table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from matplotlib.figure import Figure

from eval.columns import (
    EXIT_COLUMNS,
    MEMORY_COLUMNS,
    NONE,
    PROFILE_COLUMNS,
    RIVAL_COLUMNS,
    STRATEGY_COLUMNS,
    Column,
    how_sampled,
    interval,
    number,
    rival_rows,
    strategy_columns,
    strategy_rows,
)
from eval.plots import accepted_lengths_figure, exits_figure, speed_figure, training_figure
from eval.results import ExitQuality, PromptResult, Report, StrategyResult
from eval.titles import marked, titled, value_text

DIFFERENCES_SHOWN = 10  # for each strategy; report.json has all


@dataclass(frozen=True)
class Section:
    """A heading with notes, a table (where there are columns) and figures with what they show."""

    title: str
    columns: Sequence[Column] = ()
    rows: Sequence[Any] = ()
    notes: Sequence[str] = ()
    figures: Sequence[tuple[str, Figure]] = ()

    def cells(self) -> list[list[str]]:
        return [[column.cell(row) for column in self.columns] for row in self.rows]


def headline(report: Report) -> list[str]:
    """The report in a few lines: the fastest honest strategy, outputs that differ, prompts that failed."""
    fastest = [_fastest(report.strategies, ""), _fastest(report.sampled, f", sampled {how_sampled(report)}")]
    lines = [line for line in fastest if line]
    for strategy in _all(report):
        if strategy.lossless:
            bugs = len(_differing(strategy, "bug"))
            if bugs:
                lines.append(
                    f"{marked(strategy)}: {bugs} outputs differ from the baseline beyond rounding: a bug."
                )
        if strategy.failed:
            total = len(strategy.prompts)
            lines.append(f"{marked(strategy)}: {strategy.failed} of {total} prompts failed.")
    lines += [
        f"Compiled over not compiled, {marked(s)}: {interval(s.over_eager)}."
        for s in _all(report)
        if s.over_eager
    ]
    lines += [f"{name} is left out: {reason}." for name, reason in report.skipped.items()]
    return lines


def _fastest(strategies: Sequence[StrategyResult], how: str) -> str | None:
    honest = [s for s in strategies if s.lossless and not _differing(s, "bug")]
    ranked = [(s.speedup_median.value, s, s.speedup_median) for s in honest if s.speedup_median]
    if not ranked:
        return None
    _, best, speedup = max(ranked, key=itemgetter(0))
    verdict = "" if speedup.low > 1 else ", which shows no speedup"
    return (
        f"Fastest lossless strategy{how}: {titled(best)}:"
        f" {speedup.value:.2f} times the baseline's tokens per second"
        f" (95 % interval {speedup.low:.2f} to {speedup.high:.2f}){verdict}."
    )


def _all(report: Report) -> list[StrategyResult]:
    """What was measured greedily, and then what was sampled."""
    return [*report.strategies, *report.sampled]


def _differing(strategy: StrategyResult, verdict: str | None = None) -> list[PromptResult]:
    different = [p for p in strategy.prompts if p.tokens_equal is False]
    return different if verdict is None else [p for p in different if _verdict(p) == verdict]


def _verdict(prompt: PromptResult) -> str:
    assert prompt.difference is not None
    return prompt.difference.verdict


def sections(report: Report) -> list[Section]:
    """The sections that the report has data for, in reading order."""
    strategies = _all(report)
    found = [
        _greedy(report),
        _sampled(report),
        _rivals(report),
        _acceptance(strategies),
        _memory(report),
        _profile(report),
        _differences(strategies),
        _failures(strategies),
        _exits(report.exits or []),
        _training(report),
        _settings_used(report),
        _environment(report),
    ]
    return [section for section in found if section is not None]


def _greedy(report: Report) -> Section | None:
    if not report.strategies:
        return None
    return _strategies("Strategies", report, report.strategies, strategy_columns(report))


def _sampled(report: Report) -> Section | None:
    if not report.sampled:
        return None
    title = f"Strategies, sampled {how_sampled(report)}"
    lossless = (
        "Where drafts are not drawn themselves, every token is drawn by the baseline's own random number, and outputs"
        " are compared token by token. For the others lossless means that every token is drawn from exactly the"
        " distribution that the baseline draws it from; then lengths differ, and a short output is mostly prefill."
    )
    return _strategies(title, report, report.sampled, STRATEGY_COLUMNS, lossless)


def _strategies(
    title: str, report: Report, strategies: Sequence[StrategyResult], columns: Sequence[Column], *more: str
) -> Section:
    figures = []
    if any(s.tokens_per_second for s in strategies):
        figures.append(("Tokens per second and speedup of each strategy", speed_figure(strategies)))
    drafting = [s for s in strategies if any(p.drafted and p.accepted_lengths for p in s.prompts)]
    if drafting:
        figures.append(("Tokens gained per target forward, by strategy", accepted_lengths_figure(drafting)))
    notes = [
        "Brackets hold a 95 % bootstrap interval over batches, which are what is timed."
        " A dash means not measured or not defined.",
        *more,
    ]
    if not all(s.lossless for s in (*strategies, *report.sampled)):
        notes.append(
            "A strategy marked (not lossless) may change the output; its speed is not comparable as such."
        )
    return Section(title, columns, strategy_rows(report, strategies), notes, figures)


def _rivals(report: Report) -> Section | None:
    if not report.rivals:
        return None
    note = "Each at the settings of the other, over the batches that both decoded, in the same run."
    return Section("Over transformers' own", RIVAL_COLUMNS, rival_rows(report), [note])


def _acceptance(strategies: Sequence[StrategyResult]) -> Section | None:
    rows = [s for s in strategies if s.acceptance_at]
    if not rows:
        return None
    depth = max(len(s.acceptance_at) for s in rows)
    columns = [Column("Strategy", "", titled)]
    columns += [Column(str(i + 1), "", _acceptance_cell(i)) for i in range(depth)]
    note = "Of the proposals that reached a position, the share accepted there."
    return Section("Acceptance at each draft position", columns, rows, [note])


def _acceptance_cell(i: int) -> Callable[[StrategyResult], str]:
    return lambda s: number(s.acceptance_at[i]) if i < len(s.acceptance_at) else NONE


def _memory(report: Report) -> Section | None:
    rows = [row for row in strategy_rows(report, _all(report)) if row.strategy.peak_bytes is not None]
    if not rows:
        return None
    note = "Of the largest batch, in 10^6 bytes, in a decode of its own that is not timed."
    return Section("Memory", MEMORY_COLUMNS, rows, [note])


def _profile(report: Report) -> Section | None:
    if not report.profile:
        return None
    steps = max(profile.steps for profile in report.profile)
    notes = [
        f"Milliseconds, means over up to {steps:,} steps of some of the batches, the prefill left out. Step and Bare"
        " are without instruments; the parts between them are of a decode with the device synchronised at every"
        " boundary, and are a little more than the whole."
    ]
    return Section("Where a step's time goes", PROFILE_COLUMNS, report.profile, notes)


def _differences(strategies: Sequence[StrategyResult]) -> Section | None:
    rows, hidden = [], 0
    for strategy in strategies:
        different = sorted(_differing(strategy), key=lambda p: ("bug", "tie").index(_verdict(p)))
        rows += [(strategy, prompt) for prompt in different[:DIFFERENCES_SHOWN]]
        hidden += max(0, len(different) - DIFFERENCES_SHOWN)
    if not rows:
        return None
    columns = [
        Column("Strategy", "", lambda row: titled(row[0])),
        Column("Prompt", "The prompt's index.", lambda row: str(row[1].index)),
        Column("Position", "The first new token that differs, from 0.", _difference_cell("position")),
        Column(
            "Expected",
            "The baseline's token id there; a dash where it had ended.",
            _difference_cell("expected"),
        ),
        Column("Got", "The strategy's token id there; a dash where it had ended.", _difference_cell("got")),
        Column("Gap", "Between the target's top two logits there.", _gap),
        Column(
            "Verdict",
            "tie: within the rounding of the dtype. bug: beyond it.",
            lambda row: _verdict(row[1]) if row[0].lossless else "allowed (not lossless)",
            text=True,
        ),
    ]
    notes = [f"{hidden} more are in report.json."] if hidden else []
    return Section("Outputs that differ from the baseline", columns, rows, notes)


Differing = tuple[StrategyResult, PromptResult]


def _difference_cell(field: str) -> Callable[[Differing], str]:
    def cell(row: Differing) -> str:
        value = getattr(row[1].difference, field, None)
        return NONE if value is None else str(value)

    return cell


def _gap(row: Differing) -> str:
    return number(row[1].difference.gap if row[1].difference else None, ".2e")


def _failures(strategies: Sequence[StrategyResult]) -> Section | None:
    rows = [(s, p) for s in strategies for p in s.prompts if p.status == "failed"]
    if not rows:
        return None
    columns = [
        Column("Strategy", "", lambda row: titled(row[0])),
        Column("Prompt", "", lambda row: str(row[1].index)),
        Column("Error", "", lambda row: row[1].error, text=True),
    ]
    note = (
        "A failed prompt has no numbers; where it failed in one of two strategies, their ratio leaves it out."
    )
    return Section("Failed prompts", columns, rows, [note])


def _exits(exits: Sequence[ExitQuality]) -> Section | None:
    if not exits:
        return None
    figure = ("Cross entropy and agreement of each exit", exits_figure(exits))
    return Section("Exits", EXIT_COLUMNS, sorted(exits, key=lambda e: e.layer), figures=[figure])


def _training(report: Report) -> Section | None:
    points = report.training
    if not points:
        return None
    last = points[-1]
    note = f"Loss {last.loss:.3f} at step {last.step:,}, after {last.tokens:,} tokens."
    measured = [p.heldout for p in points if p.heldout]
    layers = sorted({layer for heldout in measured for layer in heldout})
    rows = [(layer, [heldout[layer] for heldout in measured if layer in heldout]) for layer in layers]
    columns = [
        Column("Exit layer", "", lambda row: str(row[0])),
        Column(
            "First",
            "Held-out cross entropy at its first measurement, nats per token.",
            lambda row: number(row[1][0], ".3f"),
        ),
        Column("Last", "The same at the last measurement.", lambda row: number(row[1][-1], ".3f")),
    ]
    figure = ("Training loss and held-out cross entropy over steps", training_figure(points))
    return Section("Training", columns if rows else (), rows, [note], [figure])


def _settings_used(report: Report) -> Section | None:
    rows = [(key, value_text(value)) for key, value in report.settings.items()]
    for strategy in _all(report):
        parts = [f"{key}={value_text(value)}" for key, value in strategy.settings.items()]
        if strategy.verify_cost is not None:
            parts.append(f"measured verify cost {strategy.verify_cost:.3f}")
        rows.append((f"{marked(strategy)} ({strategy.name})", ", ".join(parts) or NONE))
    return _pairs("Settings", rows) if rows else None


def _environment(report: Report) -> Section:
    rows = []
    for key, value in report.environment.model_dump(mode="json").items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        rows.append((key.replace("_", " "), NONE if value is None else str(value)))
    return _pairs("Environment", rows)


def _pairs(title: str, rows: Sequence[tuple[str, str]]) -> Section:
    columns = [Column("Name", "", itemgetter(0)), Column("Value", "", itemgetter(1), text=True)]
    return Section(title, columns, rows)
