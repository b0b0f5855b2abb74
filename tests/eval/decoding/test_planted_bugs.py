"""The losslessness checks find bugs: each is planted into the real code, and a check has to report it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.decoding import sampling
from eval.decoding.acceptance import Greedy, Outcome
from eval.decoding.cache import Cache
from eval.decoding.drafters.base import State
from eval.decoding.drafters.self_speculative import SelfSpeculative
from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.decoding.tree import Draft
from layerskip_model.runner import Runner
from tests.eval.decoding.sampled import (
    DECISIVE,
    LOWEST,
    draws,
    p_value,
    sampled_model,
    text_probabilities,
)
from tests.eval.decoding.sampled import sampling as sampling_rule
from tests.eval.decoding.test_contract import NEW, Toy
from tests.eval.decoding.test_contract import PROMPTS as TOY_PROMPTS
from tests.eval.decoding.test_speculate import PROMPTS, naive_greedy
from tests.tiny_models import agreeing_model

Plant = Callable[[pytest.MonkeyPatch], None]

GREEDY = Runner(agreeing_model(layers=2, scale=0.2))
EXPECTED = [naive_greedy(GREEDY.model, prompt, 24) for prompt in PROMPTS]
TOY_EXPECTED = [naive_greedy(GREEDY.model, prompt, NEW + 8) for prompt in TOY_PROMPTS]
SAMPLED = Runner(sampled_model())
SETTINGS = {"temperature": 0.7, "top_k": 5}
PROBABILITIES = text_probabilities(SAMPLED.model, SETTINGS)


def greedy_is_lossless() -> bool:
    """Self-speculation says what the model says, in float64, for three rows that accept different lengths."""
    drafter = make_drafter("self_speculative", GREEDY, exit_layer=2, num_speculations=3)
    rows = decode(GREEDY, drafter, PROMPTS, max_new_tokens=24, eos_token_ids=())
    return [row.tokens for row in rows] == EXPECTED


def trees_are_lossless() -> bool:
    """The same for trees of two rows."""
    toy = Toy(GREEDY, TOY_EXPECTED)
    rows = decode(GREEDY, toy, TOY_PROMPTS, max_new_tokens=NEW, eos_token_ids=())
    return [row.tokens for row in rows] == [tokens[:NEW] for tokens in TOY_EXPECTED]


def sampling_p_value() -> float:
    """Self-speculation against the exact probabilities of all texts."""
    rule = sampling_rule(SETTINGS)
    tokens = draws(SAMPLED, "self_speculative", rule, exit_layer=1, num_speculations=2)
    return p_value(tokens, PROBABILITIES)


def test_without_bugs_the_checks_are_content() -> None:
    drafter = make_drafter("self_speculative", GREEDY, exit_layer=2, num_speculations=3)
    rows = decode(GREEDY, drafter, PROMPTS, max_new_tokens=24, eos_token_ids=())
    lengths = {length for row in rows for length in row.accepted_lengths}
    assert lengths >= {1, 2, 3, 4}  # every way a step can end, or a bug could hide in the one that is missing
    assert greedy_is_lossless()
    assert trees_are_lossless()
    assert sampling_p_value() > LOWEST


def cache_keeps(change: Callable[[list[int]], list[int]]) -> Plant:
    """Another path than was accepted goes into the cache, once: after the second draft."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        keep = Cache.keep
        calls = count()

        def wrong(self: Cache, path: list[list[int]], slot: Tensor | None = None) -> None:
            now = next(calls) == 2
            keep(self, [change(nodes) if now and nodes else nodes for nodes in path], slot)

        patch.setattr(Cache, "keep", wrong)

    return plant


def nodes_are_taken_to_be_in_place(patch: pytest.MonkeyPatch) -> None:
    """The path of a tree is not moved to the end of the prefix."""
    keep = Cache.keep
    patch.setattr(Cache, "keep", lambda self, path, slot=None: keep(self, path, None))


def bonus_of_the_wrong_row(patch: pytest.MonkeyPatch) -> None:
    """Each row gets the target's own token of the row before."""
    accept = Greedy.accept

    def wrong(self: Greedy, state: State, logits: Tensor, draft: Draft) -> Outcome:
        outcome = accept(self, state, logits, draft)
        own = [tokens[-1] for tokens in outcome.tokens]
        turned = [
            [*tokens[:-1], token] for tokens, token in zip(outcome.tokens, own[-1:] + own[:-1], strict=True)
        ]
        return replace(outcome, tokens=turned)

    patch.setattr(Greedy, "accept", wrong)


def one_draft_too_many(patch: pytest.MonkeyPatch) -> None:
    """The first draft that the target disagrees with is accepted too."""
    accept = Greedy.accept

    def wrong(self: Greedy, state: State, logits: Tensor, draft: Draft) -> Outcome:
        outcome = accept(self, state, logits, draft)
        for row, (path, tokens) in enumerate(zip(outcome.path, outcome.tokens, strict=True)):
            following = path[-1] + 1
            if following < draft.num_nodes and draft.valid[row, following]:
                path.append(following)
                tokens[-1:] = [int(draft.tokens[row, following]), int(logits[row, following].argmax())]
        return outcome

    patch.setattr(Greedy, "accept", wrong)


def drafts_with(change: Callable[[Draft], dict[str, Any]]) -> Plant:
    """Self-speculation hands over something else than it should."""
    propose = SelfSpeculative.propose

    def wrong(self: SelfSpeculative, state: State) -> Draft:
        draft = propose(self, state)
        return replace(draft, **change(draft))

    return lambda patch: patch.setattr(SelfSpeculative, "propose", wrong)


def shifted(draft: Draft) -> dict[str, Any]:
    """Each node with the exit state of the node before it."""
    assert draft.hidden is not None
    return {"hidden": draft.hidden.roll(1, dims=1)}


GREEDY_BUGS: dict[str, Plant] = {
    "the cache keeps one slot too many": cache_keeps(lambda nodes: [*nodes, nodes[-1] + 1]),
    "the cache keeps one slot too few": cache_keeps(lambda nodes: nodes[:-1] if len(nodes) > 1 else nodes),
    "the bonus comes from the wrong row": bonus_of_the_wrong_row,
    "one draft more than agreed is accepted": one_draft_too_many,
    "exit states are shifted by one": drafts_with(shifted),
    "exit states are those of another layer": drafts_with(
        lambda draft: {"entry_layer": draft.entry_layer + 1}
    ),
    "exit states of a layer run once more": drafts_with(lambda draft: {"entry_layer": draft.entry_layer - 1}),
}


@pytest.mark.parametrize("bug", GREEDY_BUGS)
def test_greedy_equality_reports(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    GREEDY_BUGS[bug](monkeypatch)
    assert not greedy_is_lossless()


TREE_BUGS: dict[str, Plant] = {
    "the keys of another branch go into the cache": cache_keeps(
        lambda nodes: [1 if node == 2 else node for node in nodes]
    ),
    "the path is not moved": nodes_are_taken_to_be_in_place,
}


@pytest.mark.parametrize("bug", TREE_BUGS)
def test_equality_of_trees_reports(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    TREE_BUGS[bug](monkeypatch)
    assert not trees_are_lossless()


def q_of_other_logits(patch: pytest.MonkeyPatch) -> None:
    """Drafts are drawn from the shaped distribution and the unshaped one is handed over."""
    draft = sampling.Sampling.draft

    def wrong(
        self: sampling.Sampling, state: State, logits: Tensor, tokens: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return draft(self, state, logits, tokens)[0], logits.softmax(dim=-1)

    patch.setattr(sampling.Sampling, "draft", wrong)


def same_numbers_everywhere(patch: pytest.MonkeyPatch) -> None:
    """A place in the text has the numbers of the place before it."""
    numbers = sampling.random_numbers

    def wrong(seed: int, streams: list[int], places: int) -> Any:
        table = numbers(seed, streams, places)
        return table[:, :1].repeat(places, axis=1)

    patch.setattr(sampling, "random_numbers", wrong)


def noise_of_one_place(patch: pytest.MonkeyPatch) -> None:
    """Whatever the place, the target's own token has the noise of the first one."""
    numbers = sampling.Drawing.numbers

    def wrong(self: sampling.Drawing, position: Tensor, purpose: int) -> Tensor:
        is_own = purpose == sampling.OWN
        return numbers(self, self._begin.expand_as(position) if is_own else position, purpose)

    patch.setattr(sampling.Drawing, "numbers", wrong)


SAMPLING_BUGS: dict[str, Plant] = {
    "drafts are always accepted": lambda patch: patch.setattr(
        sampling, "acceptance", lambda p, q, tokens: torch.ones(tokens.shape)
    ),
    "after a rejection the token comes from p": lambda patch: patch.setattr(
        sampling, "residual", lambda p, q: p
    ),
    "q is not what drafts were drawn from": q_of_other_logits,
    "one number draws a draft and accepts it": lambda patch: patch.setattr(
        sampling, "ACCEPT", sampling.DRAFT
    ),
    "all of the target's own tokens have the same noise": noise_of_one_place,
    "every place has the same numbers": same_numbers_everywhere,
}


@pytest.mark.parametrize("bug", SAMPLING_BUGS)
def test_the_chi_square_reports(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    SAMPLING_BUGS[bug](monkeypatch)
    assert sampling_p_value() < DECISIVE
