"""Sampling end to end: the distribution of whole texts, and rows that depend on nothing but their stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eval.decoding.sampling import Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from layerskip_model.runner import Runner
from tests.eval.decoding.sampled import (
    LOWEST,
    VOCABULARY,
    draws,
    naive_distribution,
    p_value,
    sampled_model,
    sampling,
    text_probabilities,
)
from tests.tiny_models import agreeing_model

SAMPLED = Runner(sampled_model())
AGREEING = Runner(agreeing_model())
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17]]
STRATEGIES: list[tuple[str, dict[str, int]]] = [
    ("autoregressive", {}),
    ("self_speculative", {"exit_layer": 1, "num_speculations": 2}),
]


@pytest.mark.parametrize(("strategy", "drafting"), STRATEGIES)
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.7}, {"top_k": 3}, {"temperature": 1.3, "top_p": 0.8}], ids=str
)
def test_texts_follow_the_models_own_distribution(
    strategy: str, drafting: dict[str, int], settings: dict[str, Any]
) -> None:
    expected = text_probabilities(SAMPLED.model, settings)
    assert p_value(draws(SAMPLED, strategy, sampling(settings), **drafting), expected) > LOWEST


def test_the_naive_distribution_is_a_distribution_cut_off() -> None:
    """What the others are compared with: three tokens left by top-k, and of those two have the mass."""
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64).log()
    p = naive_distribution(logits, {"top_k": 3, "top_p": 0.7})
    torch.testing.assert_close(p, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]], dtype=torch.float64))


def run(
    prompts: list[list[int]], streams: list[int], runner: Runner = AGREEING, **options: Any
) -> list[Generation]:
    settings = {"temperature": 0.8, "top_p": 0.9, **options.pop("settings", {})}
    rule = Sampling(Shaping(settings, (), runner.vocab_size), options.pop("seed", 0))
    strategy, drafting = options.pop("strategy", STRATEGIES[1])
    options = {"max_new_tokens": 16, "eos_token_ids": (), **options}
    return decode(
        runner, make_drafter(strategy, runner, **drafting), prompts, rule=rule, streams=streams, **options
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("context", [128, 14])
def test_a_row_depends_on_its_stream_and_not_on_its_batch(
    strategy: tuple[str, dict[str, int]], context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a short context rows end at different times, and drafts of some are cut short beside longer ones."""
    monkeypatch.setattr(AGREEING, "context_length", context)
    streams = [5, 0, 9]
    together = run(PROMPTS, streams, strategy=strategy)
    for row, prompt, stream in zip(together, PROMPTS, streams, strict=True):
        alone = run([prompt], [stream], strategy=strategy)[0]
        assert row.tokens == alone.tokens
        assert row.accepted_lengths == alone.accepted_lengths
    if strategy[0] == "self_speculative":
        drafted, accepted = (sum(getattr(row, name) for row in together) for name in ("drafted", "accepted"))
        assert 0 < accepted < drafted


def test_streams_and_seeds_differ() -> None:
    rows = run([PROMPTS[0]] * 6, [0, 1, 2, 3, 4, 0])
    assert rows[0].tokens == rows[5].tokens
    assert len({tuple(row.tokens) for row in rows}) == 5
    assert run([PROMPTS[0]], [0], seed=1)[0].tokens != rows[0].tokens
    assert run([PROMPTS[0]], [0])[0].tokens == rows[0].tokens


def test_no_row_tells_of_another() -> None:
    """The first tokens of rows on neighbouring streams are independent."""
    tokens = draws(SAMPLED, "self_speculative", sampling({}), exit_layer=1, num_speculations=2)
    pairs = tokens[0::2, :2] * VOCABULARY + tokens[1::2, :2]  # of both rows, at two places
    for place in range(2):
        counts = (
            torch.bincount(pairs[:, place], minlength=VOCABULARY**2).double().view(VOCABULARY, VOCABULARY)
        )
        if_apart = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
        statistic = ((counts - if_apart) ** 2 / if_apart).sum()
        freedom = torch.tensor((VOCABULARY - 1) ** 2 / 2, dtype=torch.float64)
        assert float(torch.special.gammaincc(freedom, statistic / 2)) > LOWEST


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("settings", [{"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}], ids=str)
def test_sampling_that_leaves_one_token_is_greedy(
    strategy: tuple[str, dict[str, int]], settings: dict[str, Any]
) -> None:
    name, drafting = strategy
    drafter = make_drafter(name, AGREEING, **drafting)
    greedy = decode(AGREEING, drafter, PROMPTS, max_new_tokens=16, eos_token_ids=())
    rows = run(PROMPTS, [0, 1, 2], strategy=strategy, settings=settings)
    for row, plain in zip(rows, greedy, strict=True):
        assert (row.tokens, row.accepted_lengths) == (plain.tokens, plain.accepted_lengths)


def test_an_ended_row_rides_along() -> None:
    full = run(PROMPTS, [0, 1, 2])
    eos = full[1].tokens[3]
    ended = run(PROMPTS, [0, 1, 2], eos_token_ids=[eos])
    for row, whole in zip(ended, full, strict=True):
        cut = whole.tokens.index(eos) + 1 if eos in whole.tokens else 16
        assert row.tokens == whole.tokens[:cut]
