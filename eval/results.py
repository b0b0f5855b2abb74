"""What `report.json` holds, and how measured prompts become a strategy's summary.

Definitions: acceptance length, acceptance rate, tokens per second and speedup mean the same here, in the
tables and in the plots. Seconds are wall time; token counts are counted from token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import to_jsonable_python

from eval.statistics import Estimate, median_ratio, pooled_rate, pooled_ratio


def _to_json(value: Any) -> Any:
    return to_jsonable_python(value, fallback=str)


Settings = Annotated[dict[str, JsonValue], BeforeValidator(_to_json)]


class _Record(BaseModel):
    # Non-finite numbers travel as strings, which JSON allows and pydantic reads back.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Environment(_Record):
    """Where, with what and how the numbers were measured."""

    versions: dict[str, str]
    device: str
    device_name: str
    dtype: str
    attn_implementation: str
    threads: int
    platform: str
    git_revision: str | None
    command: str
    date: datetime
    seed: int


class Difference(_Record):
    """The first position where an output leaves the baseline's.

    position counts new tokens from 0. expected and got are token ids, None where that output had ended.
    gap is the distance between the target's top two logits there: a "tie" is within the dtype's rounding,
    a "bug" is above it, "unknown" was not examined.
    """

    position: int
    expected: int | None
    got: int | None
    gap: float | None = None
    verdict: Literal["tie", "bug", "unknown"] = "unknown"


class PromptResult(_Record):
    """One prompt decoded by one strategy. A failed prompt has an error and no numbers.

    accepted_lengths: tokens gained by each target forward after the prefill, the bonus token counted, before
    the final cut at EOS or the limit; empty where a generator does not tell (transformers' own).
    drafted and accepted count draft tokens. proposals_at[i] and accepted_at[i]: rounds whose draft reached
    position i, and rounds that accepted it. tokens_equal: whether the token ids are the baseline's; None for
    the baseline and where they need not be (sampling).
    """

    index: int
    source: str = ""
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    finish_reason: str | None = None
    target_forwards: int | None = None
    accepted_lengths: list[int] = Field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    proposals_at: list[int] = Field(default_factory=list)
    accepted_at: list[int] = Field(default_factory=list)
    tokens_equal: bool | None = None
    difference: Difference | None = None
    distinct_trigram_share: float | None = None
    text: str = ""

    @model_validator(mode="after")
    def _failed_means_no_numbers(self) -> PromptResult:
        if (self.status == "failed") != (self.error is not None):
            raise ValueError(f"prompt {self.index}: a failed prompt, and only that, has an error text")
        if self.status == "failed" and (self.new_tokens or self.seconds):
            raise ValueError(f"prompt {self.index} failed, so it must have no new_tokens and no seconds")
        return self


class StrategyResult(_Record):
    """A strategy's prompts and their summary, made by `summarise`.

    tokens_per_second is pooled over the prompts that did not fail. The speedups, None for the baseline, are
    over the prompts that failed neither here nor there; left_out counts the prompts that they lack.
    prefill_seconds is a median. acceptance_rate is for chains only. acceptance_at[i] is the share of the
    proposals reaching position i that were accepted there, None if none reached it. `equal` of `compared`
    outputs have the baseline's token ids.
    """

    name: str
    label: str
    lossless: bool
    settings: Settings
    prompts: list[PromptResult]
    tokens_per_second: Estimate | None
    prefill_seconds: float | None
    speedup_median: Estimate | None
    speedup_pooled: Estimate | None
    acceptance_length: float | None
    acceptance_rate: float | None
    acceptance_at: list[float | None]
    predicted_speedup: float | None
    verify_cost: float | None
    equal: int
    compared: int
    distinct_trigram_share: float | None
    failed: int
    left_out: int


class ExitQuality(_Record):
    """How good the prediction after `layer` layers is on held-out text.

    cross_entropy in nats per token; top1: share of positions whose best token is the text's; agreement: share
    whose best token is the last layer's; tokens: how many positions these are means of.
    """

    layer: int
    cross_entropy: float
    bits_per_byte: float | None
    top1: float
    agreement: float
    tokens: int


class TrainingPoint(_Record):
    """One logged optimizer step: training loss, tokens seen so far, held-out cross entropy per exit layer."""

    step: int
    loss: float
    tokens: int
    heldout: dict[int, float] | None = None


class Report(_Record):
    """Everything one evaluation found; `baseline` names the strategy that the speedups are over."""

    title: str
    model: str
    baseline: str | None
    environment: Environment
    settings: Settings
    strategies: list[StrategyResult] = Field(default_factory=list)
    exits: list[ExitQuality] | None = None
    training: list[TrainingPoint] | None = None

    @model_validator(mode="after")
    def _baseline_is_there(self) -> Report:
        if self.baseline is not None and self.baseline not in {s.name for s in self.strategies}:
            raise ValueError(f"baseline {self.baseline!r} is none of the report's strategies")
        return self


def summarise(
    name: str,
    prompts: Sequence[PromptResult],
    baseline: Sequence[PromptResult] | None,
    *,
    label: str,
    lossless: bool,
    chain: bool,
    settings: dict[str, Any],
    predicted_speedup: float | None = None,
    verify_cost: float | None = None,
    seed: int = 0,
) -> StrategyResult:
    """The summary of one strategy over its prompts.

    baseline: the baseline's prompts, matched by index; None where this is the baseline. chain: whether its
    drafts are chains, for which alone an acceptance rate is defined. seed is the bootstrap's.
    Raises ValueError where two prompts share an index.
    """
    for side in (prompts, baseline or []):
        if len({p.index for p in side}) != len(side):
            raise ValueError(f"two prompts of {name} or its baseline share an index")
    ok = [p for p in prompts if p.status == "ok"]
    timed = [p for p in ok if p.seconds > 0]
    pairs = _comparable(prompts, baseline) if baseline is not None else []
    lengths = [length for p in ok for length in p.accepted_lengths]
    drafted = sum(p.drafted for p in ok)
    prefills = [p.prefill_seconds for p in ok if p.prefill_seconds is not None]
    shares = [p.distinct_trigram_share for p in ok if p.distinct_trigram_share is not None]
    columns = _speedup_columns(pairs)
    return StrategyResult(
        name=name,
        label=label,
        lossless=lossless,
        settings=settings,
        prompts=list(prompts),
        tokens_per_second=pooled_rate([p.new_tokens for p in timed], [p.seconds for p in timed], seed)
        if timed
        else None,
        prefill_seconds=median(prefills) if prefills else None,
        speedup_median=median_ratio(*columns, seed=seed) if pairs else None,
        speedup_pooled=pooled_ratio(*columns, seed=seed) if pairs else None,
        acceptance_length=sum(lengths) / len(lengths) if lengths else None,
        acceptance_rate=sum(p.accepted for p in ok) / drafted if chain and drafted else None,
        acceptance_at=_acceptance_at(ok),
        predicted_speedup=predicted_speedup,
        verify_cost=verify_cost,
        equal=sum(p.tokens_equal is True for p in ok),
        compared=sum(p.tokens_equal is not None for p in ok),
        distinct_trigram_share=sum(shares) / len(shares) if shares else None,
        failed=len(prompts) - len(ok),
        left_out=len(prompts) - (len(timed) if baseline is None else len(pairs)),
    )


Pair = tuple[PromptResult, PromptResult]


def _comparable(prompts: Sequence[PromptResult], baseline: Sequence[PromptResult]) -> list[Pair]:
    """The prompts that both decoded, with the baseline's twin of each."""
    twins = {p.index: p for p in baseline if _has_speed(p)}
    return [(p, twins[p.index]) for p in prompts if _has_speed(p) and p.index in twins]


def _has_speed(prompt: PromptResult) -> bool:
    return prompt.status == "ok" and prompt.new_tokens > 0 and prompt.seconds > 0


def _speedup_columns(pairs: Sequence[Pair]) -> tuple[list[float], list[float], list[float], list[float]]:
    return (
        [p.new_tokens for p, _ in pairs],
        [p.seconds for p, _ in pairs],
        [b.new_tokens for _, b in pairs],
        [b.seconds for _, b in pairs],
    )


def _acceptance_at(prompts: Sequence[PromptResult]) -> list[float | None]:
    depth = max((len(p.proposals_at) for p in prompts), default=0)
    proposals, accepted = [0] * depth, [0] * depth
    for prompt in prompts:
        for i, (proposed, kept) in enumerate(zip(prompt.proposals_at, prompt.accepted_at, strict=True)):
            proposals[i] += proposed
            accepted[i] += kept
    return [kept / proposed if proposed else None for kept, proposed in zip(accepted, proposals, strict=True)]
