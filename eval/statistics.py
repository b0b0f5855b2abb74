"""Intervals, ratios and predictions: the arithmetic of a speed claim. Numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

RESAMPLES_AT_ONCE = 1_000  # bounds the memory of a bootstrap over many prompts


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its confidence interval, all in the same unit."""

    __pydantic_config__: ClassVar[dict[str, str]] = {
        "extra": "forbid"
    }  # read when a report holds an Estimate

    value: float
    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[..., Array],
    *samples: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """The percentile bootstrap interval of `statistic(*samples)` over prompts.

    Each sample holds one number per prompt, [prompts]; the samples are paired, so one draw of prompts is
    applied to all of them. `statistic` must reduce the last axis: it gets [prompts] arrays for the value and
    [resamples, prompts] arrays for the interval. One prompt gives an interval of no width.

    Raises ValueError where there is no prompt, samples differ in length, or confidence is not inside (0, 1).
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not arrays or arrays[0].ndim != 1 or any(array.shape != arrays[0].shape for array in arrays):
        raise ValueError(f"samples must be flat and of one length, got shapes {[a.shape for a in arrays]}")
    if arrays[0].size == 0:
        raise ValueError("a bootstrap needs at least one prompt")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence {confidence} must be in (0, 1) and resamples {resamples} at least 1")
    generator = np.random.default_rng(seed)
    prompts = arrays[0].size
    draws = []
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        count = min(RESAMPLES_AT_ONCE, resamples - start)
        chosen = generator.integers(prompts, size=(count, prompts))  # [count, prompts]
        draws.append(statistic(*(array[chosen] for array in arrays)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    return Estimate(float(statistic(*arrays)), float(low), float(high))


def pooled_rate(tokens: ArrayLike, seconds: ArrayLike, seed: int = 0) -> Estimate:
    """Tokens per second, sum of tokens over sum of seconds, with a 95 % interval over prompts.

    Raises ValueError where a prompt has no positive seconds, and as `bootstrap_interval` does.
    """
    _require_positive("seconds", seconds)
    return bootstrap_interval(_rate, tokens, seconds, seed=seed)


def median_ratio(
    tokens: ArrayLike,
    seconds: ArrayLike,
    baseline_tokens: ArrayLike,
    baseline_seconds: ArrayLike,
    seed: int = 0,
) -> Estimate:
    """The median over prompts of (tokens per second) / (the baseline's), with a 95 % interval over prompts.

    All four are [prompts], for the same prompts in the same order. Raises ValueError where a number is not
    positive, and as `bootstrap_interval` does.
    """
    _require_positive("tokens and seconds", tokens, seconds, baseline_tokens, baseline_seconds)
    ratios = np.divide(tokens, seconds) / np.divide(baseline_tokens, baseline_seconds)
    return bootstrap_interval(lambda sample: np.median(sample, axis=-1), ratios, seed=seed)


def pooled_ratio(
    tokens: ArrayLike,
    seconds: ArrayLike,
    baseline_tokens: ArrayLike,
    baseline_seconds: ArrayLike,
    seed: int = 0,
) -> Estimate:
    """(sum tokens / sum seconds) / (the baseline's), with a 95 % interval over prompts.

    Arguments and errors as in `median_ratio`. Long outputs weigh more here than in the median.
    """
    _require_positive("tokens and seconds", tokens, seconds, baseline_tokens, baseline_seconds)

    def ratio(t: Array, s: Array, base_t: Array, base_s: Array) -> Array:
        return _rate(t, s) / _rate(base_t, base_s)

    return bootstrap_interval(ratio, tokens, seconds, baseline_tokens, baseline_seconds, seed=seed)


def _rate(tokens: Array, seconds: Array) -> Array:
    return tokens.sum(axis=-1) / seconds.sum(axis=-1)


def _require_positive(what: str, *samples: ArrayLike) -> None:
    if not all(np.all(np.asarray(sample) > 0) for sample in samples):
        raise ValueError(f"{what} must be positive for every prompt")


def distinct_trigram_share(outputs: Sequence[Sequence[int]]) -> float | None:
    """How little the outputs repeat themselves: 1.0 is no repeated trigram, near 0 is a loop.

    For each output of token ids: its distinct trigrams over its `len - 2` trigrams; then the mean over
    outputs. Outputs of fewer than 3 tokens have no trigram and do not count; None where none is left.
    """
    shares = [
        len(set(zip(ids, ids[1:], ids[2:], strict=False))) / (len(ids) - 2)
        for ids in outputs
        if len(ids) >= 3
    ]
    return float(np.mean(shares)) if shares else None


def predicted_chain_speedup(acceptance: float, drafts: int, draft_cost: float, verify_cost: float) -> float:
    """The speedup expected of a chain, (1 - a^{d+1}) / ((1 - a)(c d + v)).

    This is theorem 3.8 of arXiv 2211.17192, with a verification that costs v instead of 1.

    acceptance a: the chance that a draft is accepted, in [0, 1]. drafts d: tokens drafted per round.
    draft_cost c: one draft step over one target step. verify_cost v: a target forward of d + 1 rows over one
    of 1 row. Raises ValueError for values out of range.
    """
    _check_prediction(acceptance, drafts, verify_cost)
    if draft_cost < 0:
        raise ValueError(f"draft_cost {draft_cost} must not be negative")
    # 1 + a + ... + a^d is the fraction (1 - a^{d+1}) / (1 - a) without its hole at a = 1.
    return (1 + _expected_accepted(acceptance, drafts)) / (draft_cost * drafts + verify_cost)


def predicted_self_speculation_speedup(
    mean_accepted: float, drafts: int, exit_layer: int, num_layers: int, verify_cost: float
) -> float:
    """The speedup expected of self-speculation, (1 + m) / ((d + 1) E/L + v (L - E)/L).

    The first E of L layers run for each of d drafts and once more for the token that was not drafted from;
    the upper L - E verify d + 1 rows. mean_accepted m: drafts accepted per round, without the bonus token.
    verify_cost v: d + 1 rows over 1 row in the upper layers. Raises ValueError for values out of range.
    """
    if not 0 <= mean_accepted <= drafts:
        raise ValueError(f"mean_accepted {mean_accepted} must be between 0 and drafts {drafts}")
    if not 1 <= exit_layer < num_layers:
        raise ValueError(f"exit_layer {exit_layer} must be between 1 and {num_layers - 1}")
    _check_prediction(0.0, drafts, verify_cost)
    lower = exit_layer / num_layers
    return (1 + mean_accepted) / ((drafts + 1) * lower + verify_cost * (1 - lower))


class SelfSpeculationSettings(NamedTuple):
    """An exit layer E, the number of drafts d, and the speedup predicted for the two."""

    exit_layer: int
    num_speculations: int
    predicted_speedup: float


def best_self_speculation_settings(
    accepted: Mapping[tuple[int, int], float],
    num_layers: int,
    verify_cost_of_rows: Callable[[int], float],
) -> SelfSpeculationSettings:
    """The exit layer and the number of drafts with the highest predicted speedup, among those in `accepted`.

    accepted: (exit layer, drafts d) -> m, the drafts accepted per round, without the bonus token.
    verify_cost_of_rows(n): the upper layers' time for n rows over their time for 1 row. Of equals the
    first exit and the fewest drafts win. Raises ValueError where there is nothing to choose from.
    """
    if not accepted:
        raise ValueError("needs at least one exit layer and number of drafts")
    candidates = []
    for (layer, drafts), mean in accepted.items():
        cost = verify_cost_of_rows(drafts + 1)
        speedup = predicted_self_speculation_speedup(mean, drafts, layer, num_layers, cost)
        candidates.append(SelfSpeculationSettings(layer, drafts, speedup))
    return max(candidates, key=lambda c: (c.predicted_speedup, -c.exit_layer, -c.num_speculations))


def _expected_accepted(acceptance: float, drafts: int) -> float:
    return sum(acceptance**i for i in range(1, drafts + 1))


def _check_prediction(acceptance: float, drafts: int, verify_cost: float) -> None:
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance {acceptance} must be between 0 and 1")
    if drafts < 0:
        raise ValueError(f"drafts {drafts} must not be negative")
    if verify_cost <= 0:
        raise ValueError(f"verify_cost {verify_cost} must be positive")
