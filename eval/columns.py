"""The columns of the report's tables: their titles, what they mean, and how a number is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.results import Answers, Report, StrategyResult
from eval.statistics import Estimate
from eval.titles import NOT_LOSSLESS, setting_words, titled

NONE = "-"


@dataclass(frozen=True)
class Column:
    """A table's column: its title, what it means in one line, and a row's text in it.

    text: whether it is prose. short: the title where space is scarce, with its line breaks; "" leaves the
    column out there. spare: where even that does not fit, the highest goes first and 0 never.
    """

    title: str
    meaning: str
    cell: Callable[[Any], str]
    text: bool = False
    short: str | None = None
    spare: int = 0


@dataclass(frozen=True)
class StrategyRow:
    """A strategy of a table, and the same one sampled where the table is the greedy one."""

    strategy: StrategyResult
    is_baseline: bool
    sampled: StrategyResult | None = None


@dataclass(frozen=True)
class RivalRow:
    """One of ours beside one of transformers' own, and how much faster it is."""

    ours: StrategyResult
    peer: StrategyResult
    greedy: Estimate | None
    sampled: Estimate | None


def number(value: float | None, form: str = ".2f", scale: float = 1.0) -> str:
    """A number as it is printed, or NONE."""
    return NONE if value is None else format(value * scale, form)


def interval(estimate: Estimate | None) -> str:
    """`1.52x [1.40,1.66]`, or NONE."""
    if estimate is None:
        return NONE
    return f"{estimate.value:.2f}x [{estimate.low:.2f},{estimate.high:.2f}]"


def _name(row: StrategyRow) -> str:
    return titled(row.strategy) + (" (baseline)" if row.is_baseline else "")


def _identical(row: StrategyRow) -> str:
    return f"{row.strategy.equal}/{row.strategy.compared}" if row.strategy.compared else NONE


def _sampled_speedup(row: StrategyRow) -> str:
    speedup = row.sampled.speedup_median if row.sampled else None
    lossless = speedup is None or row.sampled is None or row.sampled.lossless
    return interval(speedup) + ("" if lossless else NOT_LOSSLESS)


def _megabytes(count: int | None) -> str:
    return number(count, ".1f", scale=1e-6)


STRATEGY_COLUMNS = [
    Column("Strategy", "The decoding method with its settings.", _name),
    Column(
        "Tokens/s",
        "New tokens over wall time, prefill included, all batches pooled.",
        lambda row: number(row.strategy.tokens_per_second and row.strategy.tokens_per_second.value, ".1f"),
        short="Tokens\n/s",
    ),
    Column(
        "Speedup",
        "Tokens per second over the baseline's for the same batch; the median over batches.",
        lambda row: interval(row.strategy.speedup_median),
    ),
    Column(
        "Pooled speedup",
        "Tokens per second of all batches together over the baseline's; long outputs weigh more.",
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
        spare=2,
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
        spare=1,
    ),
    Column(
        "Prefill ms",
        "Time to the first token, the median over batches.",
        lambda row: number(row.strategy.prefill_seconds, ".1f", scale=1000),
        short="Prefill\nms",
        spare=3,
    ),
]
MEMORY_COLUMNS = [
    Column("Strategy", "", _name),
    Column(
        "Peak MB",
        "The most memory in use at once: on a GPU what tensors occupy, on a CPU the whole process with Python"
        " and its libraries.",
        lambda row: _megabytes(row.strategy.peak_bytes),
    ),
    Column(
        "Added MB",
        "Of it, what was not in use before the decode: cache, exit states, activations, logits.",
        lambda row: _megabytes(row.strategy.added_bytes),
    ),
    Column(
        "Ratio",
        "The model's weights and what was added, over the same for the baseline.",
        lambda row: number(row.strategy.memory_ratio, ".3f"),
    ),
]


def _phase(title: str, phase: str, meaning: str) -> Column:
    return Column(title, meaning, lambda profile: _milliseconds(profile.phases[phase]))


def _milliseconds(seconds: float) -> str:
    return number(seconds, ".3f" if seconds < 0.01 else ".2f" if seconds < 0.1 else ".1f", scale=1000)


PROFILE_COLUMNS = [
    Column("Strategy", "", lambda profile: profile.label),
    Column("Step", "A verification and all that goes with it.", lambda profile: _milliseconds(profile.step)),
    _phase("Draft", "draft forwards", "The drafter's forwards."),
    _phase("Verify", "verify forward", "The target's forward over the draft."),
    _phase("Choose", "choosing drafts", "Choosing the drafted tokens."),
    _phase("Accept", "acceptance", "Accepting a path; it waits for the device."),
    _phase("Cache", "cache", "Keeping the path in the cache."),
    Column("Python", "The rest: contexts, limits, the loop.", lambda profile: _milliseconds(profile.python)),
    Column("Bare", "The forwards alone, back to back.", lambda profile: _milliseconds(profile.bare)),
    Column(
        "Over, %",
        "How much Step is above Bare.",
        lambda profile: number(profile.overhead, ".1f", 100),
        short="Over\n%",
    ),
]
RIVAL_COLUMNS = [
    Column("Ours", "Our strategy.", lambda row: titled(row.ours)),
    Column("Theirs", "The strategy of transformers' own that does the same.", lambda row: row.peer.label),
    Column(
        "Ratio",
        "Our tokens per second over theirs for the same batch; the median over batches.",
        lambda row: interval(row.greedy),
    ),
    Column("Sampled ratio", "The same where tokens are drawn.", lambda row: interval(row.sampled)),
]
SAMPLED_COLUMNS = [
    Column(
        "Sampled speedup",
        "The speedup where tokens are drawn, over the baseline that draws them too; more of it is below.",
        _sampled_speedup,
        short="Sampled\nspeedup",
    ),
    Column(
        "Sampled length",
        "The acceptance length of what is drawn.",
        lambda row: number(row.sampled and row.sampled.acceptance_length),
        short="Sampled\nlength",
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


def _setting_text(row: Answers) -> str:
    return ", ".join([row.strategy.replace("_", " "), *setting_words(row.settings)])


ANSWER_COLUMNS = [
    Column("Strategy", "The decoding method with its settings.", _setting_text),
    Column("Exact match", "Right answers, in %.", lambda row: number(row.right / row.asked, ".1f", 100)),
    Column("Right", "Right answers of those asked for.", lambda row: f"{row.right}/{row.asked}"),
    Column("Equal ids", "Answers with the last layer's token ids.", lambda row: f"{row.equal}/{row.asked}"),
]


def strategy_columns(report: Report) -> list[Column]:
    """The columns of the first table of strategies: with the sampled twins' where it is the greedy one."""
    if not (report.strategies and report.sampled):
        return STRATEGY_COLUMNS
    place = 1 + [column.title for column in STRATEGY_COLUMNS].index("Acceptance length")
    return [*STRATEGY_COLUMNS[:place], *SAMPLED_COLUMNS, *STRATEGY_COLUMNS[place:]]


def strategy_rows(report: Report, strategies: Sequence[StrategyResult]) -> list[StrategyRow]:
    """These strategies of the report in their order, the baseline marked, with their sampled twins."""
    twins = {strategy.name: strategy for strategy in report.sampled}
    return [
        StrategyRow(s, s.name == report.baseline, None if s.sampled else twins.get(s.name))
        for s in strategies
    ]


def rival_rows(report: Report) -> list[RivalRow]:
    """Ours and transformers' own that do the same, each pair once."""
    named = {s.name: s for s in (*report.sampled, *report.strategies)}
    ratios = {(pair.ours, pair.peer, pair.sampled): pair.ratio for pair in report.rivals}
    return [
        RivalRow(named[ours], named[peer], ratios.get((ours, peer, False)), ratios.get((ours, peer, True)))
        for ours, peer in dict.fromkeys((pair.ours, pair.peer) for pair in report.rivals)
    ]


def how_sampled(report: Report) -> str:
    """`at temperature 0.8, top_k 50`, as far as the report says."""
    settings = report.settings.get("sampling")
    given = settings if isinstance(settings, dict) else {}
    off = {"temperature": None, "top_k": 0, "top_p": 1.0}
    parts = [f"{name} {given[name]}" for name in off if given.get(name) not in (None, off[name])]
    how = f"at {', '.join(parts)}" if parts else "by the checkpoint's settings"
    return how + (", typical acceptance" if given.get("acceptance") == "typical" else "")
