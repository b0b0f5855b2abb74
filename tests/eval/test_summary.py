"""What becomes of measured prompts: checked by hand, and batches as the unit of what is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from eval.results import PromptResult
from eval.statistics import median_ratio, pooled_rate, pooled_ratio
from eval.summary import rivals, with_ratio
from tests.eval.samples import BASELINE, failed, prompt, strategy


def test_summary_by_hand() -> None:
    first = {"accepted_lengths": [3, 1], "drafted": 4, "accepted": 2, "distinct_trigram_share": 1.0}
    second = {"accepted_lengths": [4], "drafted": 3, "accepted": 3, "distinct_trigram_share": 0.5}
    prompts = [
        prompt(0, 10, 1.0, proposals_at=[2, 2], accepted_at=[1, 1], tokens_equal=True, **first),
        prompt(1, 20, 1.0, proposals_at=[1, 1, 1], accepted_at=[1, 1, 1], tokens_equal=False, **second),
    ]
    found = strategy(prompts)
    assert found.tokens_per_second is not None
    assert found.speedup_median is not None
    assert found.speedup_pooled is not None
    assert found.tokens_per_second.value == pytest.approx(15.0)
    assert found.speedup_median.value == pytest.approx(np.median([10 / 5, 20 / 5]))
    assert found.speedup_pooled.value == pytest.approx(15 / 5)
    assert found.prefill_seconds == pytest.approx(0.015)
    assert found.acceptance_length == pytest.approx(8 / 3)
    assert found.acceptance_rate == pytest.approx(5 / 7)
    assert found.acceptance_at == pytest.approx([2 / 3, 2 / 3, 1.0])
    assert (found.equal, found.compared, found.failed, found.left_out) == (1, 2, 0, 0)
    assert found.distinct_trigram_share == pytest.approx(0.75)


def test_a_tree_has_no_acceptance_rate_and_the_baseline_no_speedup() -> None:
    chain = prompt(0, 10, 1.0, drafted=2, accepted=1, proposals_at=[1, 1], accepted_at=[1, 0])
    tree = prompt(1, 10, 1.0, drafted=6, accepted=2)
    for prompts in ([tree], [chain, tree]):  # also where some drafts only were chains
        assert (strategy(prompts).acceptance_rate, strategy(prompts).acceptance_at) == (None, [])
    assert (strategy([chain]).acceptance_rate, strategy([chain]).acceptance_at) == (0.5, [1.0, 0.0])
    base = strategy(BASELINE, None)
    assert base.speedup_median is None
    assert base.speedup_pooled is None
    assert base.acceptance_length == 1.0
    assert base.acceptance_rate is None


def test_zero_acceptance_is_a_number() -> None:
    prompts = [
        prompt(0, 3, 1.0, accepted_lengths=[1, 1], drafted=2, accepted=0, proposals_at=[2], accepted_at=[0])
    ]
    found = strategy(prompts)
    assert (found.acceptance_length, found.acceptance_rate, found.acceptance_at) == (1.0, 0.0, [0.0])


def batched(*batches: tuple[float, Sequence[int]], **fields: Any) -> list[PromptResult]:
    """Prompts in a row of indices: for each batch its seconds and its prompts' new tokens."""
    found: list[PromptResult] = []
    for number, (seconds, tokens) in enumerate(batches):
        shared = {"batch": number, "prefill_seconds": seconds / 10, **fields}
        found += [prompt(len(found) + i, count, seconds, **shared) for i, count in enumerate(tokens)]
    return found


def test_a_batch_is_timed_once_and_resampled_whole() -> None:
    ours = batched((2.0, [10, 20]), (4.0, [10, 10]), (1.0, [30]))
    base = batched((3.0, [10, 10]), (8.0, [10, 10]), (6.0, [10]))
    found = strategy(ours, base, seed=5)
    tokens, seconds = [30, 20, 30], [2.0, 4.0, 1.0]
    columns = (tokens, seconds, [20, 20, 10], [3.0, 8.0, 6.0])
    assert found.tokens_per_second == pooled_rate(tokens, seconds, 5)
    assert found.speedup_median == median_ratio(*columns, seed=5)
    assert found.speedup_pooled == pooled_ratio(*columns, seed=5)
    assert found.prefill_seconds == pytest.approx(0.2)
    assert (found.failed, found.left_out) == (0, 0)


def test_one_batch_gives_no_interval_however_many_prompts_it_has() -> None:
    found = strategy(batched((2.0, [10, 20, 15])), batched((4.0, [10, 20, 15])))
    assert found.speedup_median is not None
    assert found.speedup_median.low == found.speedup_median.value == found.speedup_median.high == 2.0


def test_a_batch_that_failed_on_either_side_leaves_the_ratio_with_all_its_prompts() -> None:
    base = batched((4.0, [10, 10]), (4.0, [10, 10]), (4.0, [10, 10]))
    ours = batched((2.0, [10, 10]), (1.0, [10, 10]), (4.0, [10, 10]))
    found = strategy([*ours[:4], failed(4), failed(5)], [failed(0), failed(1), *base[2:]])
    assert found.speedup_pooled is not None
    assert found.speedup_pooled.value == pytest.approx(4.0)
    assert (found.failed, found.left_out) == (2, 4)


def test_batches_of_other_prompts_are_not_compared() -> None:
    found = strategy(batched((1.0, [10, 10])), [*batched((1.0, [10])), failed(1)])
    assert found.speedup_median is None
    assert found.left_out == 2


def test_memory_is_the_largest_batchs_and_its_ratio_paired() -> None:
    def measured(peak: int | None, added: int | None) -> list[PromptResult]:
        small, large = (
            batched((1.0, [10, 10]), (1.0, [10, 10]))[:2],
            batched((1.0, [10, 10]), (1.0, [10, 10]))[2:],
        )
        noted = {"peak_bytes": peak, "added_bytes": added}
        return [*small, *(one.model_copy(update=noted) for one in large)]

    found = strategy(measured(110, 20), measured(100, 10), weight_bytes=90)
    assert (found.peak_bytes, found.added_bytes, found.memory_ratio) == (110, 20, pytest.approx(1.1))
    for ours, base in (((110, 20), (None, None)), ((None, None), (100, 10))):
        assert strategy(measured(*ours), measured(*base), weight_bytes=90).memory_ratio is None
    assert strategy(measured(110, 20), None, weight_bytes=90).memory_ratio is None
    assert strategy(measured(110, 20), measured(100, 0)).memory_ratio is None  # nothing to compare with


def test_ours_is_compared_with_the_peer_that_does_the_same() -> None:
    given: dict[str, Any] = {"settings": {"max_ngram": 3}}
    ours = strategy([prompt(i, 10, 1.0) for i in range(3)], name="a", strategy="prompt_lookup", **given)
    peer = strategy(
        [prompt(0, 10, 1.5), failed(1), prompt(2, 10, 2.0)], name="b", strategy="hf_prompt_lookup", **given
    )
    (found,) = rivals([ours, peer], seed=3)
    assert (found.ours, found.peer, found.sampled) == ("a", "b", False)
    assert found.ratio == median_ratio([10, 10], [1.0, 1.0], [10, 10], [1.5, 2.0], seed=3)
    for change in (
        {"settings": {"max_ngram": 2}},
        {"settings": {"max_ngram": 3, "more": 1}},
        {"strategy": "lookahead"},
        {"sampled": True},
        {"lossless": False},
        {"prompts": [failed(0), prompt(1, 10, 1.0), failed(2)]},
    ):
        assert rivals([ours.model_copy(update=change), peer], seed=3) == []


def test_a_compiled_strategy_is_compared_with_its_twin() -> None:
    compiled = strategy([prompt(0, 10, 1.0), prompt(1, 10, 1.0)])
    twin = strategy([prompt(0, 10, 1.5), prompt(1, 10, 2.0), prompt(2, 10, 9.0)])
    assert compiled.over_eager is None
    found = with_ratio(compiled, twin, 0).over_eager
    assert found is not None
    assert found.value == pytest.approx(np.median([1.5, 2.0]))
    assert with_ratio(twin, twin, 0).over_eager is None
    assert with_ratio(compiled, None, 0).over_eager is None
    assert with_ratio(compiled, strategy([failed(0)]), 0).over_eager is None
