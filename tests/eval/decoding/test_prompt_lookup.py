"""Prompt lookup: the index finds what a scan finds, and decoding with it is lossless."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.decoding.capture import GraphRunner
from eval.decoding.drafters.base import State
from eval.decoding.drafters.prompt_lookup import NgramIndex, PromptLookup
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from eval.decoding.tree import Draft
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.eval.decoding.sampled import DECISIVE, LOWEST, draws, p_value, sampled_model, text_probabilities
from tests.eval.decoding.sampled import sampling as sampling_rule
from tests.eval.decoding.test_planted_bugs import cache_keeps, same_numbers_everywhere
from tests.eval.decoding.test_speculate import naive_greedy
from tests.tiny_models import agreeing_model

NEW = 40
PROMPTS = [[3, 4, 5, 6, 3, 4], [10, 11, 12], [7, 7, 7, 7, 7, 7, 7, 7, 7]]
MODEL = Runner(agreeing_model(layers=1, scale=0.02))  # it soon says the same things again
EXPECTED = [naive_greedy(MODEL.model, prompt, NEW) for prompt in PROMPTS]
SAMPLED = Runner(sampled_model())
SETTINGS = {"temperature": 0.7, "top_k": 5}
PROBABILITIES = text_probabilities(SAMPLED.model, SETTINGS)


def naive_continuation(text: list[int], longest: int, count: int) -> list[int]:
    """By a scan, the longest suffix first, the latest place first, token by token."""
    for length in range(min(longest, len(text) - 1), 0, -1):
        for begin in reversed(range(len(text) - length)):
            if text[begin : begin + length] == text[-length:]:
                copied = list(text)
                for ahead in range(count):
                    copied.append(copied[begin + length + ahead])
                return copied[len(text) :]
    return []


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(st.integers(1, 30), max_size=8),
)
def test_the_index_finds_what_a_scan_finds(
    text: list[int], longest: int, count: int, steps: list[int]
) -> None:
    """However the text grew."""
    index = NgramIndex(longest)
    for end in sorted({min(end, len(text)) for end in [*steps, len(text)]}):
        assert index.continuation(text[:end], count) == naive_continuation(text[:end], longest, count)


def test_a_loop_is_drafted_round_and_round() -> None:
    index = NgramIndex(3)
    assert index.continuation([1, 2, 3], 4) == []
    assert index.continuation([1, 2, 3, 1], 7) == [2, 3, 1, 2, 3, 1, 2]
    assert NgramIndex(3).continuation([5, 5], 3) == [5, 5, 5]
    assert NgramIndex(2).continuation([1, 9, 1, 2, 4, 9, 2, 9, 1], 2) == [2, 4]  # the longest, not the latest


def run(
    prompts: list[list[int]], runner: Runner = MODEL, drafting: dict[str, int] | None = None, **options: Any
) -> list[Generation]:
    drafter = make_drafter("prompt_lookup", runner, **(drafting or {"max_ngram": 2, "num_speculations": 5}))
    return decode(runner, drafter, prompts, **{"max_new_tokens": NEW, "eos_token_ids": (), **options})


def naive_steps(prompt: list[int], future: list[int], longest: int, drafts: int) -> list[tuple[int, int]]:
    """What greedy decoding with a scan drafts and wins at each step."""
    done, steps = 1, []
    while done < len(future):
        count = min(drafts, len(future) - done - 1)
        drafted = naive_continuation(prompt + future[:done], longest, count)
        right = [token == wanted for token, wanted in zip(drafted, future[done:], strict=False)]
        steps.append((len(drafted), 1 + [*right, False].index(False)))
        done += steps[-1][1]
    return steps


def drafts_as_a_scan_does(rows: list[Generation], longest: int, drafts: int) -> bool:
    steps = [naive_steps(p, future, longest, drafts) for p, future in zip(PROMPTS, EXPECTED, strict=True)]
    return [(row.drafted, row.accepted_lengths) for row in rows] == [
        (sum(drafted for drafted, _ in one), [won for _, won in one]) for one in steps
    ]


@pytest.mark.parametrize(("longest", "drafts"), [(1, 1), (3, 10), (2, 5)])
def test_greedy_is_lossless_and_drafts_as_a_scan_does(longest: int, drafts: int) -> None:
    settings = {"max_ngram": longest, "num_speculations": drafts}
    together = run(PROMPTS, drafting=settings)
    alone = [run([prompt], drafting=settings)[0] for prompt in PROMPTS]
    for rows in (together, alone, run(PROMPTS, GraphRunner(MODEL), settings)):
        assert [row.tokens for row in rows] == EXPECTED
        assert drafts_as_a_scan_does(rows, longest, drafts)
    lengths = [length for row in together for length in row.accepted_lengths]
    assert {1, drafts + 1} <= set(lengths)


def test_rows_end_where_they_would_alone() -> None:
    end = EXPECTED[1][5]
    runner = Runner(agreeing_model(layers=1, scale=0.02, max_position_embeddings=20))
    for row, tokens, prompt in zip(run(PROMPTS, runner, eos_token_ids=[end]), EXPECTED, PROMPTS, strict=True):
        cut = tokens[: 20 - len(prompt)]
        assert row.tokens == (cut[: cut.index(end) + 1] if end in cut else cut)
        assert row.finish_reason == ("eos" if end in cut else "context")


def test_two_shapes_where_shapes_are_fixed() -> None:
    graphs = GraphRunner(MODEL)
    run(PROMPTS, graphs)
    run(PROMPTS[:1], graphs)
    assert {shape[1] for _, _, shape, _ in graphs._passes} == {1, 6}


def test_texts_follow_the_models_distribution() -> None:
    tokens = draws(SAMPLED, "prompt_lookup", sampling_rule(SETTINGS), max_ngram=2, num_speculations=2)
    assert p_value(tokens, PROBABILITIES) > LOWEST


def test_a_sampled_row_is_the_one_of_plain_sampling() -> None:
    """Token by token, as drafts are tried with the target's own."""

    def rule() -> Sampling:
        return Sampling(Shaping({"temperature": 0.6}, (), MODEL.vocab_size), 4)

    plain = decode(
        MODEL,
        make_drafter("autoregressive", MODEL),
        PROMPTS,
        max_new_tokens=NEW,
        eos_token_ids=(),
        rule=rule(),
    )
    rows = run(PROMPTS, rule=rule())
    assert [row.tokens for row in rows] == [row.tokens for row in plain]
    assert sum(row.accepted for row in rows) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_ngram": 0}, "max_ngram=0 is not valid; give a whole number of 1 or more"),
        ({"num_speculations": 0}, "num_speculations=0 is not valid"),
        ({"exit_layer": 2}, "prompt_lookup has no setting 'exit_layer'; its settings: max_ngram, num_spec"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_drafter("prompt_lookup", MODEL, **settings)


Plant = Callable[[pytest.MonkeyPatch], None]


def proposals(change: Callable[[Draft, State], Draft]) -> Plant:
    """Prompt lookup proposes something else than it should."""
    propose = PromptLookup.propose
    return lambda patch: patch.setattr(
        PromptLookup, "propose", lambda self, state: change(propose(self, state), state)
    )


def root_again(draft: Draft, state: State) -> Draft:
    """The token before the last one is the root."""
    before = torch.tensor([[text[-2]] for text in state.texts])
    return replace(draft, tokens=torch.cat([before, draft.tokens[:, 1:]], dim=1))


def neighbours(draft: Draft, state: State) -> Draft:
    """Each row gets the nodes of the row before."""
    return replace(draft, tokens=draft.tokens.roll(1, dims=0))


def said_to_be_drawn(draft: Draft, state: State) -> Draft:
    """From all tokens alike, which they are not."""
    if draft.num_nodes == 1:
        return draft
    vocabulary = state.runner.backbone.vocab_size
    q = torch.full((state.batch, draft.num_nodes - 1, vocabulary), 1 / vocabulary)
    return replace(draft, q=q)


def one_token_late(patch: pytest.MonkeyPatch) -> None:
    """The first token of the copy is left out."""
    copy = NgramIndex.continuation
    patch.setattr(NgramIndex, "continuation", lambda self, text, count: copy(self, text, count + 1)[1:])


def sampling_p_value() -> float:
    rule = sampling_rule(SETTINGS)
    tokens = draws(SAMPLED, "prompt_lookup", rule, rows=5000, max_ngram=2, num_speculations=2)
    return p_value(tokens, PROBABILITIES)


@pytest.mark.parametrize(
    "bug",
    [
        proposals(root_again),
        proposals(neighbours),
        cache_keeps(lambda nodes: [*nodes, nodes[-1] + 1]),
    ],
    ids=["root", "rows", "cache"],
)
def test_greedy_equality_reports(bug: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row.tokens for row in run(PROMPTS)] == EXPECTED
    bug(monkeypatch)
    assert [row.tokens for row in run(PROMPTS)] != EXPECTED


def test_the_scan_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    one_token_late(monkeypatch)
    assert not drafts_as_a_scan_does(run(PROMPTS), 2, 5)


@pytest.mark.parametrize("bug", [proposals(said_to_be_drawn), same_numbers_everywhere])
def test_the_chi_square_reports(bug: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    assert sampling_p_value() < DECISIVE
