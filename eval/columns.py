"""The columns of the report's tables: their titles, what they mean, and how a number is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.plots import marked
from eval.results import Report, StrategyResult
from eval.statistics import Estimate

NONE = "-"
SETTING_SHOWN = 24  # characters of one setting in the strategy's name


@dataclass(frozen=True)
class Column:
    """A table's column: its title, what it means in one line, and a row's text in it.

    text: whether it is prose. short: the title where space is scarce, with its line breaks; "" leaves the
    column out there.
    """

    title: str
    meaning: str
    cell: Callable[[Any], str]
    text: bool = False
    short: str | None = None


@dataclass(frozen=True)
class StrategyRow:
    strategy: StrategyResult
    is_baseline: bool


def number(value: float | None, form: str = ".2f", scale: float = 1.0) -> str:
    """A number as it is printed, or NONE."""
    return NONE if value is None else format(value * scale, form)


def interval(estimate: Estimate | None) -> str:
    """`1.52x [1.40,1.66]`, or NONE."""
    if estimate is None:
        return NONE
    return f"{estimate.value:.2f}x [{estimate.low:.2f},{estimate.high:.2f}]"


def value_text(value: Any, longest: int | None = None) -> str:
    """A setting's value as it is printed, cut to `longest` characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if longest is None or len(text) <= longest else text[: longest - 3] + "..."


def titled(strategy: StrategyResult) -> str:
    """The strategy's label, marked where it is not lossless, with its settings."""
    settings = [f"{key}={value_text(value, SETTING_SHOWN)}" for key, value in strategy.settings.items()]
    return ", ".join([marked(strategy), *settings])


def _name(row: StrategyRow) -> str:
    return titled(row.strategy) + (" (baseline)" if row.is_baseline else "")


def _identical(row: StrategyRow) -> str:
    return f"{row.strategy.equal}/{row.strategy.compared}" if row.strategy.compared else NONE


STRATEGY_COLUMNS = [
    Column("Strategy", "The decoding method with its settings.", _name),
    Column(
        "Tokens/s",
        "New tokens over wall time, prefill included, all prompts pooled.",
        lambda row: number(row.strategy.tokens_per_second and row.strategy.tokens_per_second.value, ".1f"),
        short="Tokens\n/s",
    ),
    Column(
        "Speedup",
        "Tokens per second over the baseline's for the same prompt; the median over prompts.",
        lambda row: interval(row.strategy.speedup_median),
    ),
    Column(
        "Pooled speedup",
        "Tokens per second of all prompts together over the baseline's; long outputs weigh more.",
        lambda row: interval(row.strategy.speedup_pooled),
        short="",
    ),
    Column(
        "Predicted",
        "The speedup that the acceptance and the costs of drafting and verifying promise.",
        lambda row: number(row.strategy.predicted_speedup),
        short="Pre-\ndicted",
    ),
    Column(
        "Acceptance length",
        "Tokens gained per target forward after the prefill, the bonus token counted; 1.00 without drafts.",
        lambda row: number(row.strategy.acceptance_length),
        short="Acc.\nlength",
    ),
    Column(
        "Acceptance rate",
        "Accepted drafts over drafted tokens; for chains only.",
        lambda row: number(row.strategy.acceptance_rate),
        short="Acc.\nrate",
    ),
    Column(
        "Identical outputs",
        "Outputs with exactly the baseline's token ids, of those compared.",
        _identical,
        short="Equal\nids",
    ),
    Column(
        "Distinct trigrams",
        "Distinct over all trigrams of an output, mean over outputs; low means that the text loops.",
        lambda row: number(row.strategy.distinct_trigram_share),
        short="Tri-\ngrams",
    ),
    Column(
        "Prefill ms",
        "Time to the first token, the median over prompts.",
        lambda row: number(row.strategy.prefill_seconds, ".1f", scale=1000),
        short="Prefill\nms",
    ),
]

EXIT_COLUMNS = [
    Column("Exit layer", "How many layers run before the head.", lambda e: str(e.layer)),
    Column("Cross entropy", "Nats per token on held-out text.", lambda e: number(e.cross_entropy, ".3f")),
    Column("Bits per byte", "The same in bits per byte of text.", lambda e: number(e.bits_per_byte, ".3f")),
    Column("Top-1", "Positions whose best token is the text's, in %.", lambda e: number(e.top1, ".1f", 100)),
    Column(
        "Agreement",
        "Positions whose best token is the last layer's, in %: the acceptance of this exit's drafts.",
        lambda e: number(e.agreement, ".1f", 100),
    ),
    Column("Tokens", "Positions measured.", lambda e: f"{e.tokens:,}"),
]


def strategy_rows(report: Report) -> list[StrategyRow]:
    """The strategies in the report's order, the baseline marked."""
    return [StrategyRow(s, s.name == report.baseline and s.speedup_median is None) for s in report.strategies]
