"""What `report.json` holds.

Definitions: acceptance length, acceptance rate, tokens per second and speedup mean the same here, in the
tables and in the plots. Seconds are wall time; token counts are counted from token ids.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import to_jsonable_python

from eval.statistics import Estimate


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
    a "bug" is above it.
    """

    position: int
    expected: int | None
    got: int | None
    gap: float | None = None
    verdict: Literal["tie", "bug"]


class PromptResult(_Record):
    """One prompt decoded by one strategy. A failed prompt has an error and no numbers.

    batch: the number of the batch that it was decoded in; None where it failed before it came into one.
    seconds, prefill_seconds, decode_seconds: wall time of that whole batch, the same for all its prompts.
    peak_bytes, added_bytes: the peak of memory while that batch was decoded, and how much of it was not in use
    before; None where it was not measured (it is for the largest batch).
    accepted_lengths: tokens gained by each target forward after the prefill, the bonus token counted, before
    the final cut at EOS or the limit; empty where a generator does not tell (transformers' own).
    drafted and accepted count draft tokens. proposals_at[i] and accepted_at[i]: rounds whose draft reached
    position i, and rounds that accepted it. tokens_equal: whether the token ids are the baseline's; None for
    the baseline and where they need not be (sampling with drafts that are drawn).
    """

    index: int
    source: str = ""
    batch: int | None = None
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    peak_bytes: int | None = None
    added_bytes: int | None = None
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
        if self.status == "ok" and self.batch is None:
            raise ValueError(f"prompt {self.index} did not fail, so it was in a batch")
        return self


class StrategyResult(_Record):
    """A strategy's prompts and their summary, made by `summarise`.

    name: its entry's, which no other has; strategy: the strategy's alone. settings: those in force; variant:
    those of them that its entry gave. sampled: whether its tokens were drawn; else it is greedy.
    tokens_per_second is pooled over the batches that did not fail. The speedups, None for the baseline, are
    over the batches that failed neither here nor there; left_out counts the prompts that they lack.
    prefill_seconds is a median over batches. peak_bytes and added_bytes are the largest measured. memory_ratio
    is the model's weights and the added bytes over the same for the baseline's decode of that batch.
    acceptance_rate and acceptance_at are for chains only; acceptance_at[i] is the share of the proposals
    reaching position i that were accepted there, None if none reached it. `equal` of `compared` outputs have
    the baseline's token ids. over_eager: where its passes were captured, its tokens per second over those of
    its twin whose were not, the median over batches.
    """

    name: str
    strategy: str
    label: str
    lossless: bool
    sampled: bool
    settings: Settings
    variant: list[str]
    prompts: list[PromptResult]
    tokens_per_second: Estimate | None
    prefill_seconds: float | None
    speedup_median: Estimate | None
    speedup_pooled: Estimate | None
    acceptance_length: float | None
    acceptance_rate: float | None
    acceptance_at: list[float | None]
    predicted_speedup: float | None = None
    verify_cost: float | None = None
    peak_bytes: int | None
    added_bytes: int | None
    memory_ratio: float | None
    over_eager: Estimate | None = None
    equal: int
    compared: int
    distinct_trigram_share: float | None
    failed: int
    left_out: int


class Rivals(_Record):
    """A strategy of ours and the one of transformers' own that does the same with the same settings, both by name.

    ratio: our tokens per second over theirs for the same batch, the median over batches.
    """

    ours: str
    peer: str
    sampled: bool
    ratio: Estimate


class StepProfile(_Record):
    """Where a strategy's step goes, in seconds a step, the prefill left out.

    phases and python are parts of an instrumented decode, the device synchronised at every boundary; step is the
    same decode's without instruments, bare is what its forwards take when run one right after the other, and
    overhead is step / bare - 1.
    """

    name: str
    label: str
    sampled: bool
    steps: int
    step: float
    phases: dict[str, float]
    python: float
    bare: float
    overhead: float


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


class Answers(_Record):
    """How often one way of decoding gave the right answer (`right` of `asked`, exact match).

    equal: how many answers have the very token ids of the last layer's.
    """

    strategy: str
    settings: dict[str, Any]
    right: int
    equal: int
    asked: int


class TrainingPoint(_Record):
    """One logged optimizer step: training loss, tokens seen so far, held-out cross entropy per exit layer."""

    step: int
    loss: float
    tokens: int
    heldout: dict[int, float] | None = None


class Report(_Record):
    """Everything one evaluation found; `baseline` names the strategy that the speedups are over.

    strategies decoded greedily, sampled are the same at a temperature, over the baseline at that temperature;
    either may be empty. skipped: strategies that could not take part at all, by name, with the reason.
    """

    title: str
    model: str
    baseline: str | None
    environment: Environment
    settings: Settings
    strategies: list[StrategyResult] = Field(default_factory=list)
    sampled: list[StrategyResult] = Field(default_factory=list)
    skipped: dict[str, str] = Field(default_factory=dict)
    rivals: list[Rivals] = Field(default_factory=list)
    profile: list[StepProfile] = Field(default_factory=list)
    exits: list[ExitQuality] | None = None
    training: list[TrainingPoint] | None = None

    @model_validator(mode="after")
    def _baseline_is_there(self) -> Report:
        tables = [table for table in (self.strategies, self.sampled) if table]
        if self.baseline is not None and not all(
            self.baseline in {s.name for s in table} for table in tables
        ):
            raise ValueError(f"baseline {self.baseline!r} is none of the report's strategies")
        return self
