"""What self-speculation's acceptance promises: by hand, and for batches that wait for their slowest prompt."""

from __future__ import annotations

from typing import Any

import pytest

from eval import prediction
from eval.prediction import length_of_slowest, verify_cost, with_prediction
from eval.results import PromptResult
from eval.target import Target
from tests.eval.samples import prompt, strategy

SETTINGS = {"exit_layer": 1, "num_speculations": 3}


def decoded(*batches: list[list[int]]) -> list[PromptResult]:
    """For each batch the accepted lengths of its prompts."""
    return [
        prompt(10 * number + i, sum(lengths), 1.0, batch=number, accepted_lengths=lengths, prompt_tokens=4)
        for number, batch in enumerate(batches)
        for i, lengths in enumerate(batch)
    ]


def test_a_batch_goes_as_far_as_its_slowest_prompt() -> None:
    fast, slow, other = decoded([[4, 4, 4], [2, 2, 2, 2, 2, 2]], [[3, 3]])
    assert length_of_slowest([[fast, slow], [other]]) == pytest.approx((6 * 2 + 2 * 3) / 8)
    assert length_of_slowest([[fast], [slow], [other]]) == pytest.approx((12 + 12 + 6) / 11)


def test_the_prediction_by_hand(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def cost(target: Target, *arguments: int) -> float:
        asked.append(arguments)
        return 1.5

    monkeypatch.setattr(prediction, "verify_cost", cost)
    prompts = decoded([[4, 4, 4], [2] * 6], [[3, 3]])
    summary = strategy(prompts, strategy="self_speculative", settings=SETTINGS)
    found = with_prediction(tiny_target, summary)
    assert asked == [
        (1, 4, 10, 2)
    ]  # exit layer, rows, middle of 4 + 12/2, 4 + 12/2 and 4 + 6/2, prompts together
    assert found.predicted_speedup == pytest.approx(2.25 / (4 * 1 / 4 + 1.5 * 3 / 4))
    assert found.verify_cost == 1.5


def test_there_is_no_prediction_without_drafts(tiny_target: Target) -> None:
    prompts = decoded([[4, 4]])
    for other in (
        strategy(prompts, strategy="autoregressive"),
        strategy(
            [prompt(0, 1, 1.0)], strategy="self_speculative", settings=SETTINGS
        ),  # ended by its first token
        strategy(
            prompts, strategy="self_speculative", settings={**SETTINGS, "draft_tree": True}
        ),  # no fixed chain
    ):
        assert with_prediction(tiny_target, other) == other


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cost_of_verifying_is_measured(tiny_target: Target, batch: int) -> None:
    assert verify_cost(tiny_target, 2, 4, 20, batch) > 0
    assert verify_cost(tiny_target, 2, 4, 1000, batch) > 0  # as long as the context allows
