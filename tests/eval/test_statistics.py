from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.statistics import (
    Estimate,
    best_self_speculation_settings,
    bootstrap_interval,
    distinct_trigram_share,
    median_ratio,
    pooled_rate,
    pooled_ratio,
    predicted_chain_speedup,
    predicted_self_speculation_speedup,
)


def mean(sample: np.ndarray) -> np.ndarray:
    return sample.mean(axis=-1)


def test_interval_matches_a_loop_over_the_same_draws() -> None:
    x, y = [1.0, 2.0, 4.0, 8.0], [3.0, 1.0, 2.0, 5.0]
    found = bootstrap_interval(
        lambda a, b: a.sum(-1) / b.sum(-1), x, y, confidence=0.8, resamples=300, seed=5
    )
    draws = np.random.default_rng(5).integers(4, size=(300, 4))
    ratios = [sum(x[i] for i in draw) / sum(y[i] for i in draw) for draw in draws]
    assert found.value == pytest.approx(15 / 11)
    assert [found.low, found.high] == pytest.approx(list(np.quantile(ratios, [0.1, 0.9])))


def test_interval_covers_a_known_ratio() -> None:
    generator = np.random.default_rng(0)
    trials, hits = 150, {"median": 0, "pooled": 0}
    for trial in range(trials):
        tokens = generator.integers(20, 80, size=30).astype(float)
        baseline_seconds = tokens / 20 * generator.lognormal(0, 0.1, size=30)
        seconds = tokens / 30 * generator.lognormal(0, 0.1, size=30)
        columns = (tokens, seconds, tokens, baseline_seconds)
        for name, ratio in (("median", median_ratio), ("pooled", pooled_ratio)):
            interval = ratio(*columns, seed=trial)
            hits[name] += interval.low <= 1.5 <= interval.high
    # 95 % nominal; the percentile bootstrap of 30 prompts is a little narrow, three deviations are 5.3 %.
    assert all(0.88 <= hit / trials < 1 for hit in hits.values()), hits


def test_interval_is_paired_seeded_and_flat_for_one_prompt() -> None:
    x = np.arange(1.0, 20.0)
    paired = bootstrap_interval(lambda a, b: a.sum(-1) / b.sum(-1), 3 * x, x)
    assert paired.low == pytest.approx(3) == paired.high
    assert bootstrap_interval(mean, x, seed=1) == bootstrap_interval(mean, x, seed=1)
    assert bootstrap_interval(mean, x, seed=1) != bootstrap_interval(mean, x, seed=2)
    assert bootstrap_interval(mean, [2.5]) == Estimate(2.5, 2.5, 2.5)
    narrow, wide = (bootstrap_interval(mean, x, confidence=c) for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


@pytest.mark.parametrize("samples", [[], [[]], [[1.0], [1.0, 2.0]], [[[1.0]]]])
def test_interval_refuses_what_is_not_one_number_per_prompt(samples: list) -> None:
    with pytest.raises(ValueError, match=r"prompt|flat"):
        bootstrap_interval(mean, *samples)


def test_ratios_by_hand() -> None:
    tokens, seconds = [10, 30, 20], [1.0, 2.0, 4.0]  # 10, 15 and 5 tokens per second
    baseline_tokens, baseline_seconds = [10, 20, 20], [2.0, 4.0, 2.0]  # 5, 5 and 10
    assert median_ratio(tokens, seconds, baseline_tokens, baseline_seconds).value == pytest.approx(2.0)
    assert pooled_ratio(tokens, seconds, baseline_tokens, baseline_seconds).value == pytest.approx(
        (60 / 7) / (50 / 8)
    )
    assert pooled_rate(tokens, seconds).value == pytest.approx(60 / 7)
    with pytest.raises(ValueError, match="positive"):
        median_ratio([0], [1.0], [1], [1.0])
    with pytest.raises(ValueError, match="positive"):
        pooled_rate([1], [0.0])


def naive_share(ids: list[int]) -> float:
    trigrams = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
    return sum(trigrams.index(t) == i for i, t in enumerate(trigrams)) / len(trigrams)


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=4))
def test_distinct_trigram_share_matches_the_definition(outputs: list[list[int]]) -> None:
    shares = [naive_share(ids) for ids in outputs if len(ids) >= 3]
    expected = pytest.approx(sum(shares) / len(shares)) if shares else None
    assert distinct_trigram_share(outputs) == expected


def test_distinct_trigram_share_of_a_loop_and_of_short_outputs() -> None:
    assert distinct_trigram_share([[7] * 102]) == pytest.approx(0.01)
    assert distinct_trigram_share([[1, 2, 3, 4], [1, 2]]) == 1.0
    assert distinct_trigram_share([[1, 2], []]) is None


@given(st.floats(0, 0.99), st.integers(0, 12), st.floats(0, 1), st.floats(1, 3))
def test_chain_prediction_is_the_closed_form(a: float, d: int, c: float, v: float) -> None:
    assert predicted_chain_speedup(a, d, c, v) == pytest.approx((1 - a ** (d + 1)) / ((1 - a) * (c * d + v)))


def test_chain_prediction_at_the_ends() -> None:
    assert predicted_chain_speedup(1.0, 5, 0.1, 1.0) == pytest.approx(6 / 1.5)
    assert predicted_chain_speedup(1 - 1e-12, 5, 0.1, 1.0) == pytest.approx(6 / 1.5)
    assert predicted_chain_speedup(0.0, 5, 0.1, 1.0) == pytest.approx(1 / 1.5)
    assert predicted_chain_speedup(0.5, 0, 0.1, 1.0) == 1.0
    for wrong in ((1.1, 1, 0.1, 1.0), (0.5, -1, 0.1, 1.0), (0.5, 1, -0.1, 1.0), (0.5, 1, 0.1, 0.0)):
        with pytest.raises(ValueError, match="must"):
            predicted_chain_speedup(*wrong)


def simulated_layers(accepted: int, drafts: int, exit_layer: int, layers: int, verify: float) -> float:
    """Layer runs of a round, one token's worth each, counted step by step; over the tokens it yields."""
    cost = 0.0
    for _ in range(drafts + 1):  # every draft, and the last token, through the lower layers
        for _ in range(exit_layer):
            cost += 1
    for _ in range(exit_layer, layers):
        cost += verify
    return cost / (accepted + 1)


@pytest.mark.parametrize(("accepted", "drafts", "exit_layer"), [(0, 1, 1), (3, 4, 2), (6, 6, 7)])
def test_self_speculation_prediction_counts_layers(accepted: int, drafts: int, exit_layer: int) -> None:
    predicted = predicted_self_speculation_speedup(accepted, drafts, exit_layer, 8, 1.25)
    assert predicted == pytest.approx(8 / simulated_layers(accepted, drafts, exit_layer, 8, 1.25))


@pytest.mark.parametrize(
    "wrong", [(3, 2, 1, 8, 1.0), (1, 2, 0, 8, 1.0), (1, 2, 8, 8, 1.0), (1, 2, 4, 8, 0.0)]
)
def test_self_speculation_prediction_refuses_nonsense(wrong: tuple) -> None:
    with pytest.raises(ValueError, match="must"):
        predicted_self_speculation_speedup(*wrong)


def test_best_settings_are_the_best_of_all() -> None:
    accepted = {(layer, d): min(d, 0.3 * layer) * 0.9 for layer in (2, 4, 8) for d in range(1, 10)}

    def cost(rows: int) -> float:
        return 1 + 0.03 * (rows - 1)

    best = best_self_speculation_settings(accepted, 12, cost)
    table = {
        (layer, d): (1 + m) / ((d + 1) * layer / 12 + cost(d + 1) * (12 - layer) / 12)
        for (layer, d), m in accepted.items()
    }
    assert best[:2] == max(table, key=lambda key: table[key])
    assert best.predicted_speedup == pytest.approx(max(table.values()))


def test_best_settings_at_the_ends() -> None:
    perfect = {(layer, d): float(d) for layer in (6, 1) for d in (4, 1, 2, 3)}
    assert best_self_speculation_settings(perfect, 12, lambda rows: 1.0)[:2] == (1, 4)
    nothing = {(layer, d): 0.0 for layer in (3, 2) for d in (2, 1)}
    useless = best_self_speculation_settings(nothing, 12, lambda rows: float(rows))
    assert useless[:2] == (2, 1)
    assert useless.predicted_speedup < 1
    equal = {(2, 1): 1.0, (1, 2): 1.0}  # 2 / (2 * 1/2 + 1/2) and 2 / (3 * 1/4 + 3/4)
    assert best_self_speculation_settings(equal, 4, lambda rows: 1.0)[:2] == (1, 2)
    with pytest.raises(ValueError, match="at least one"):
        best_self_speculation_settings({}, 12, lambda rows: 1.0)


def test_verify_cost_is_asked_for_one_row_more_than_the_drafts() -> None:
    asked: list[int] = []

    def cost(rows: int) -> float:
        asked.append(rows)
        return 1.0

    best_self_speculation_settings({(2, d): 0.5 for d in (1, 2, 3)}, 4, cost)
    assert asked == [2, 3, 4]
