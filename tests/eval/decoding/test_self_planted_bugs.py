"""Bugs planted into drafts that stop and into draft trees: equality or the chi-square reports each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.decoding.cache import Cache
from eval.decoding.drafters.base import State
from eval.decoding.drafters.confidence import Confidence
from eval.decoding.drafters.self_tree import SelfTree
from eval.decoding.growing import Growing
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
    sampling,
    text_probabilities,
)
from tests.eval.decoding.test_speculate import PROMPTS, naive_greedy
from tests.tiny_models import agreeing_model

Plant = Callable[[pytest.MonkeyPatch], None]

GREEDY = Runner(agreeing_model(layers=2, scale=0.6))
EXPECTED = [naive_greedy(GREEDY.model, prompt, 24) for prompt in PROMPTS]
SAMPLED = Runner(sampled_model())
SETTINGS = {"temperature": 0.7}
PROBABILITIES = text_probabilities(SAMPLED.model, SETTINGS)


def trees_are_lossless() -> bool:
    """For three rows, of which some go on from drafts that were expanded and some from others."""
    settings = {"draft_tree": True, "tree_top_k": 4, "tree_tokens": 12}
    drafter = make_drafter("self_speculative", GREEDY, exit_layer=2, num_speculations=3, **settings)
    rows = decode(GREEDY, drafter, PROMPTS, max_new_tokens=24, eos_token_ids=())
    return [row.tokens for row in rows] == EXPECTED


def stopped_p_value() -> float:
    """Sampling with drafts that stop after most first drafts."""
    settings: dict[str, Any] = {"exit_layer": 1, "num_speculations": 2, "draft_stop": "confidence"}
    return p_value(
        draws(SAMPLED, "self_speculative", sampling(SETTINGS), stop_threshold=0.85, **settings), PROBABILITIES
    )


def test_without_bugs_the_checks_are_content() -> None:
    assert trees_are_lossless()
    assert stopped_p_value() > LOWEST


def drafts_with(change: Callable[[Draft], dict[str, Any]]) -> Plant:
    """The tree is handed over with something else than there should be."""
    propose = SelfTree.propose

    def wrong(self: SelfTree, state: State, depth: int) -> Draft:
        draft = propose(self, state, depth)
        return replace(draft, **change(draft))

    return lambda patch: patch.setattr(SelfTree, "propose", wrong)


def exit_states_by_rank(draft: Draft) -> dict[str, Any]:
    """The first states that were made, and not those of the nodes that were kept."""
    assert draft.hidden is not None
    return {"hidden": draft.hidden[:, torch.arange(draft.num_nodes) // 2]}


def siblings_are_seen(draft: Draft) -> dict[str, Any]:
    """Every node sees all that come before it."""
    n = draft.num_nodes
    return {"visible": torch.ones(n, n, dtype=torch.bool).tril().expand(draft.tokens.shape[0], -1, -1)}


def kept_nodes_stay_where_they_were_run(patch: pytest.MonkeyPatch) -> None:
    """Their keys and values are not moved to where the other layers put theirs."""
    move = Cache.move

    def wrong(self: Cache, row: Tensor, source: Tensor, target: Tensor, stop: int) -> None:
        if stop == len(self.keys):
            move(self, row, source, target, stop)

    patch.setattr(Cache, "move", wrong)


def the_first_drafts_are_taken_to_be_in_place(patch: pytest.MonkeyPatch) -> None:
    """The path of a tree in order is not moved to the end of the prefix."""
    move = Cache.move

    def wrong(self: Cache, row: Tensor, source: Tensor, target: Tensor, stop: int) -> None:
        if stop < len(self.keys):
            move(self, row, source, target, stop)

    patch.setattr(Cache, "move", wrong)


def uncles_for_parents(patch: pytest.MonkeyPatch) -> None:
    """The ancestors of a node that goes on are taken to be those of the node beside it."""
    expand = Growing.expand

    def wrong(self: Growing, log_probabilities: Tensor, tokens: Tensor) -> None:
        stop = self.stop
        expand(self, log_probabilities, tokens)
        if self.stop > stop:
            now = slice(self.first, self.stop)
            ancestors = self.visible[:, now] & ~self.plan.itself[now]
            self.visible[:, now] = ancestors.roll(1, dims=1) | self.plan.itself[now]

    patch.setattr(Growing, "expand", wrong)


TREE_BUGS: dict[str, Plant] = {
    "exit states are those of other nodes": drafts_with(exit_states_by_rank),
    "siblings are seen": drafts_with(siblings_are_seen),
    "kept nodes stay where they were run": kept_nodes_stay_where_they_were_run,
    "the path is not moved": the_first_drafts_are_taken_to_be_in_place,
    "everyone is one place further": drafts_with(lambda draft: {"position": draft.position + 1}),
    "the ancestors are another's": uncles_for_parents,
    "nodes are given to the node before their parent": drafts_with(
        lambda draft: {"parents": torch.where(draft.parents > 0, draft.parents - 1, draft.parents)}
    ),
}


@pytest.mark.parametrize("bug", TREE_BUGS)
def test_equality_of_trees_reports(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    TREE_BUGS[bug](monkeypatch)
    assert not trees_are_lossless()


def unlikely_drafts_are_dropped(patch: pytest.MonkeyPatch) -> None:
    """A draft that ends the chain is not up for acceptance itself: what is kept leans to what is likely."""
    drafted = Confidence.drafted

    def wrong(self: Confidence, drafts: int) -> Tensor:
        limits = torch.tensor(self._limit)[:, None]
        estimates = torch.tensor(self._estimate)[:, None]
        drafted(self, drafts)
        return torch.where(estimates < self._threshold, limits - 1, limits)

    patch.setattr(Confidence, "drafted", wrong)


def padding_is_accepted(patch: pytest.MonkeyPatch) -> None:
    """What stands after the end of a row's chain was drawn for nobody, and copied from another place."""
    chain = State.chain

    def wrong(self: State, tokens: Tensor, *args: Any, drafted: Tensor | None = None, **other: Any) -> Draft:
        if drafted is not None:
            ended = torch.arange(tokens.shape[1]) > drafted
            tokens = torch.where(ended, tokens[:, :1], tokens)
        return chain(self, tokens, *args, **other)

    patch.setattr(State, "chain", wrong)


STOP_BUGS: dict[str, Plant] = {
    "unlikely drafts are dropped": unlikely_drafts_are_dropped,
    "padding is up for acceptance": padding_is_accepted,
}


@pytest.mark.parametrize("bug", STOP_BUGS)
def test_the_chi_square_reports(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    STOP_BUGS[bug](monkeypatch)
    assert stopped_p_value() < DECISIVE
