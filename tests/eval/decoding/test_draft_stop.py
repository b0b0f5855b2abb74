"""Drafts that stop: where they do, that rows do on their own, and that nothing changes in the output."""

from __future__ import annotations

import math
from typing import Any

import pytest

from eval.decoding.capture import GraphRunner
from eval.decoding.drafters.base import Drafter
from eval.decoding.drafters.confidence import DISAGREEMENT, default_threshold
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.eval.decoding.sampled import LOWEST, draws, p_value, sampled_model, sampling, text_probabilities
from tests.eval.decoding.test_self_tree import drafts_of, exit_logits, shallow
from tests.eval.decoding.test_speculate import PROMPTS, naive_greedy
from tests.tiny_models import agreeing_model, tiny_model

AGREEING = Runner(agreeing_model(layers=2, scale=0.3))
SAMPLED = Runner(sampled_model())


def stopping(runner: Runner, threshold: float | None = None, drafts: int = 5) -> Drafter:
    settings: dict[str, Any] = {"exit_layer": 2, "num_speculations": drafts, "draft_stop": "confidence"}
    return make_drafter("self_speculative", runner, stop_threshold=threshold, **settings)


def run(runner: Runner, drafter: Drafter, prompts: list[list[int]], **options: Any) -> list[Generation]:
    return decode(runner, drafter, prompts, **{"max_new_tokens": 20, "eos_token_ids": (), **options})


def drawing() -> Sampling:
    return Sampling(Shaping({"temperature": 0.8}, (), AGREEING.vocab_size), 0)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.2, 0.9, 1.0])
def test_greedy_drafts_that_stop_are_lossless(threshold: float | None) -> None:
    expected = [naive_greedy(AGREEING.model, prompt, 20) for prompt in PROMPTS]
    together = run(AGREEING, stopping(AGREEING, threshold), PROMPTS)
    alone = [run(AGREEING, stopping(AGREEING, threshold), [prompt])[0] for prompt in PROMPTS]
    assert [row.tokens for row in together] == [row.tokens for row in alone] == expected
    for row, single in zip(together, alone, strict=True):
        assert row.accepted_lengths == single.accepted_lengths
        assert (row.drafted, row.proposals_at) == (single.drafted, single.proposals_at)


@pytest.mark.parametrize("context", [128, 14])
def test_a_drawn_row_depends_on_its_stream_and_not_on_its_batch(
    context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows stop at different drafts, beside others that go on, and end at different times."""
    monkeypatch.setattr(AGREEING, "context_length", context)
    streams = [5, 0, 9]
    together = run(AGREEING, stopping(AGREEING, 0.7), PROMPTS, rule=drawing(), streams=streams)
    for row, prompt, stream in zip(together, PROMPTS, streams, strict=True):
        alone = run(AGREEING, stopping(AGREEING, 0.7), [prompt], rule=drawing(), streams=[stream])[0]
        assert (row.tokens, row.accepted_lengths) == (alone.tokens, alone.accepted_lengths)
        assert (row.drafted, row.proposals_at) == (alone.drafted, alone.proposals_at)
    assert 0 < sum(row.accepted for row in together) < sum(row.drafted for row in together)


def test_a_chain_ends_where_the_estimate_falls_under_the_threshold() -> None:
    """Beside the product of the exit's own probabilities, from separate passes."""
    threshold, exit_model = 0.6, shallow("llama", 2)
    lengths = set()
    for texts, draft in drafts_of(AGREEING, stopping(AGREEING, threshold, 3), PROMPTS, new=12)[:3]:
        for row, text in enumerate(texts):
            tokens = draft.tokens[row, draft.valid[row]].tolist()[1:]
            chances = []
            for place, token in enumerate(tokens):
                logits = exit_logits(exit_model, text, tuple(tokens[:place]))
                chances.append(float((logits / DISAGREEMENT).softmax(-1)[token]))
            estimates = [math.prod(chances[: count + 1]) for count in range(len(chances))]
            assert all(estimate >= threshold for estimate in estimates[:-1])
            assert len(tokens) == 3 or estimates[-1] < threshold
            lengths.add(len(tokens))
    assert len(lengths) > 1


def test_thresholds_at_the_ends() -> None:
    """0 never stops, and above what any product is, one draft is left."""
    plain = make_drafter("self_speculative", AGREEING, exit_layer=2, num_speculations=5)
    expected = run(AGREEING, plain, PROMPTS)
    rows = run(AGREEING, stopping(AGREEING, 0.0), PROMPTS)
    assert [(row.accepted_lengths, row.drafted) for row in rows] == [
        (row.accepted_lengths, row.drafted) for row in expected
    ]
    for row in run(AGREEING, stopping(AGREEING, 1.0), PROMPTS, rule=drawing()):
        assert set(row.accepted_lengths) <= {1, 2}
        assert len(row.proposals_at) == 1


def test_the_default_goes_by_the_cost_of_a_draft() -> None:
    assert stopping(AGREEING).threshold == 0.75  # type: ignore[attr-defined]
    assert default_threshold(2, 16) == 0.25
    assert default_threshold(1, 32) < default_threshold(2, 32) < default_threshold(24, 32) <= 1


def test_passes_of_fixed_shape_give_the_same_tokens() -> None:
    """What was not drafted is padding then."""
    graphs = GraphRunner(AGREEING)
    for prompts in ([PROMPTS[0]], PROMPTS):
        for rule in (None, drawing()):
            plain = run(AGREEING, stopping(AGREEING, 0.7), prompts, rule=rule)
            fixed = run(graphs, stopping(graphs, 0.7), prompts, rule=rule)
            assert [(row.tokens, row.accepted_lengths, row.drafted) for row in fixed] == [
                (row.tokens, row.accepted_lengths, row.drafted) for row in plain
            ]


@pytest.mark.parametrize(
    ("settings", "threshold"),
    [({"temperature": 0.7}, 0.8), ({"temperature": 1.3, "top_p": 0.8}, None)],
    ids=str,
)
def test_texts_follow_the_models_own_distribution(settings: dict[str, Any], threshold: float | None) -> None:
    expected = text_probabilities(SAMPLED.model, settings)
    shape: dict[str, Any] = {"exit_layer": 1, "num_speculations": 2, "draft_stop": "confidence"}
    assert (
        p_value(
            draws(SAMPLED, "self_speculative", sampling(settings), stop_threshold=threshold, **shape),
            expected,
        )
        > LOWEST
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_stop": "entropy"}, "draft_stop='entropy' is not valid; give confidence"),
        ({"stop_threshold": 0.5}, "stop_threshold=0.5 is for draft_stop=confidence; add that or leave"),
        ({"draft_stop": "confidence", "stop_threshold": 1.5}, "stop_threshold=1.5 is not valid"),
        ({"tree_top_k": 2}, "tree_top_k=2 is for draft_tree"),
        ({"tree_tokens": 9}, "tree_tokens=9 is for draft_tree"),
        ({"draft_tree": 1}, "draft_tree=1 is not valid; give True or False"),
        (
            {"draft_tree": True, "tree_top_k": 0},
            "tree_top_k=0 is not valid; give a whole number from 1 to 64",
        ),
        ({"draft_tree": True, "tree_tokens": 0}, "tree_tokens=0 is not valid"),
        ({"draft_tree": True, "draft_stop": "confidence"}, "leave one of them out"),
        ({"draft_tree": True, "stop_threshold": 0.5}, "stop_threshold=0.5 is for draft_stop=confidence"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    runner = Runner(tiny_model())
    with pytest.raises(UserError) as caught:
        make_drafter("self_speculative", runner, exit_layer=2, num_speculations=3, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
