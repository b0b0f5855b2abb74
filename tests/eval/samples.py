"""A small report and its parts, for the tests of results and report."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from eval.results import (
    Environment,
    ExitQuality,
    PromptResult,
    Report,
    StrategyResult,
    TrainingPoint,
)
from eval.summary import summarise

ENVIRONMENT = Environment(
    versions={"torch": "2.13.0"},
    device="cpu",
    device_name="a <cpu>",
    dtype="float32",
    attn_implementation="sdpa",
    threads=1,
    platform="Linux",
    git_revision=None,
    command="python -m eval benchmark | tee log",
    date=datetime(2025, 1, 2, tzinfo=UTC),
    seed=0,
)
EXITS = [
    ExitQuality(
        layer=n, cross_entropy=4 - n / 4, bits_per_byte=None, top1=n / 10, agreement=n / 4, tokens=1000
    )
    for n in (4, 2)
]
TRAINING = [
    TrainingPoint(
        step=s, loss=5 - s / 10, tokens=s * 64, heldout={2: 5.0, 4: 4.0 - s / 10} if s != 1 else None
    )
    for s in range(3)
]


def prompt(index: int, tokens: int, seconds: float, **fields: Any) -> PromptResult:
    given = {"batch": index, "prefill_seconds": 0.01 * (index + 1), **fields}
    return PromptResult(index=index, new_tokens=tokens, seconds=seconds, **given)


def failed(index: int) -> PromptResult:
    return PromptResult(index=index, batch=index, status="failed", error="out of <memory> | [x]")


BASELINE = [prompt(i, 10, 2.0, accepted_lengths=[1] * 9, distinct_trigram_share=0.5) for i in range(4)]


def strategy(
    prompts: list[PromptResult], baseline: list[PromptResult] | None = BASELINE, **fields: Any
) -> StrategyResult:
    given = {"strategy": "draft", "label": "Draft", "lossless": True, "settings": {}, **fields}
    predicted: dict[str, Any] = {
        name: given.pop(name) for name in ("predicted_speedup", "verify_cost") if name in given
    }
    return summarise(given.pop("name", "draft"), prompts, baseline, **given).model_copy(update=predicted)


def report(*strategies: StrategyResult, **fields: Any) -> Report:
    base = strategy(BASELINE, None, name="autoregressive", label="Autoregressive")
    given = {"title": "A title", "model": "a/model", "settings": {"max_steps": 10}, **fields}
    return Report(baseline="autoregressive", environment=ENVIRONMENT, strategies=[base, *strategies], **given)
