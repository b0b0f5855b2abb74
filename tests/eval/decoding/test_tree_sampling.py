"""Sampling over trees keeps the target's distribution: integrated over all random numbers, and end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.decoding import sampling
from eval.decoding.acceptance import Outcome
from eval.decoding.drafters.base import Drafter, State
from eval.decoding.sampling import ACCEPT, OWN, Drawing, Sampling, draw
from eval.decoding.speculate import decode
from eval.decoding.tree import Draft
from layerskip_model.runner import Runner
from tests.eval.decoding.sampled import (
    DECISIVE,
    LOWEST,
    PROMPT,
    ROWS,
    TOKENS,
    VOCABULARY,
    draws,
    p_value,
    sampled_model,
    text_probabilities,
)
from tests.eval.decoding.sampled import sampling as sampling_rule
from tests.eval.decoding.test_sampling import (
    Tables,
    Text,
    accept_with,
    add,
    completed,
    on_grid,
    p_of_texts,
)
from tests.eval.decoding.trees import Tree, draft_of, path_to, random_tree

PARTS = 4  # p is in multiples of 1 / PARTS: then numbers in the middle of these cells stand for all


def with_tokens(random: Random, nodes: int, vocabulary: int, distinct: bool) -> tuple[Tree, list[int]]:
    """A tree at most three deep and the tokens of its nodes; siblings are distinct where wanted."""
    while True:
        tree = random_tree(random, nodes, nodes, plain=distinct)
        tokens = [random.randrange(vocabulary) for _ in range(nodes)]
        siblings = list(zip(tree.parents, tokens, strict=True))
        if depth_of(tree) <= 3 and (not distinct or len(set(siblings)) == nodes):
            return tree, tokens


def depth_of(tree: Tree) -> int:
    return max(len(path_to(tree.sees, node)) for node in range(len(tree.sees))) - 1


def text_at(tree: Tree, tokens: list[int], node: int) -> Text:
    return tuple(tokens[index] for index in path_to(tree.sees, node)[1:])


def won_by_the_rule(
    p: Tables, tree: Tree, tokens: list[int], vocabulary: int, patch: pytest.MonkeyPatch
) -> dict[Text, float]:
    """The distribution of the tokens that one verification gives: the rule itself, with every number there is."""
    places = depth_of(tree) + 1
    middle = [(cell + 0.5) / PARTS for cell in range(PARTS)]
    cases = list(product(middle, repeat=places))
    numbers = torch.full((len(cases), places + 1, 3), torch.nan, dtype=torch.float64)
    numbers[:, :places, OWN] = torch.tensor(cases, dtype=torch.float64)
    p_nodes = torch.tensor([[p[text_at(tree, tokens, node)] for node in range(len(tokens))]])
    ids = torch.tensor([tokens]).expand(len(cases), -1)
    draft = draft_of([tree] * len(cases), ids, torch.zeros((len(cases), 1), dtype=torch.int64), len(tokens))
    outcome = accept_with(
        numbers, p_nodes.double().expand(len(cases), -1, -1), replace(draft, visible=None), patch
    )
    won: dict[Text, float] = {}
    for emitted in outcome.tokens:
        add(won, tuple(emitted), 1 / len(cases))
    return won


def won_in_turn(p: Tables, tree: Tree, tokens: list[int], node: int = 0) -> dict[Text, float]:
    """The same by the rule of EAGLE: children tried in turn, each with what is left of p, then a token of the rest."""
    left = list(p[text_at(tree, tokens, node)])
    won: dict[Text, float] = {}
    mass = 1.0  # that no child was accepted so far
    for child in range(node + 1, len(tokens)):
        if tree.parents[child] == node and not tree.riders[child] and sum(left) > 0:
            token = tokens[child]
            share = left[token] / sum(left)
            for text, part in won_in_turn(p, tree, tokens, child).items():
                add(won, (token, *text), mass * share * part)
            mass *= 1 - share
            left[token] = 0.0
    for token, weight in enumerate(left):
        if weight:
            add(won, (token,), mass * weight / sum(left))
    return {text: part for text, part in won.items() if part}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("distinct", [True, False])
def test_the_kept_tokens_are_distributed_as_the_targets(
    seed: int, distinct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With duplicate siblings, riders and padding, too."""
    vocabulary = 4
    random = Random(seed)
    tree, tokens = with_tokens(random, random.randrange(2, 9), vocabulary, distinct)
    length = depth_of(tree) + 1
    p, _ = on_grid(vocabulary, length, PARTS, seed)
    won = won_by_the_rule(p, tree, tokens, vocabulary, monkeypatch)
    expected = won_in_turn(p, tree, tokens)
    wanted = p_of_texts(p, vocabulary, length)
    for result in (won, expected):
        whole = completed(result, p, vocabulary, length)
        assert whole == pytest.approx(wanted, abs=1e-12)
    if distinct:
        assert won == pytest.approx(expected, abs=1e-12)


def test_of_duplicate_siblings_the_one_that_leads_on_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where trying them in turn ends with the first one."""
    tree = Tree([-1, 0, 0, 2], [-1, 0, 0, 2], [0, 1, 2, 3], [False] * 4)
    p: Tables = {(): [0.0, 1.0], (1,): [1.0, 0.0], (1, 0): [1.0, 0.0]}
    tokens = [0, 1, 1, 0]
    assert won_by_the_rule(p, tree, tokens, 2, monkeypatch) == {(1, 0, 0): 1.0}
    assert won_in_turn(p, tree, tokens) == {(1, 0): 1.0}


TREE = Tree([-1, 0, 0, 1, 1, 2, 3], [-1, 0, 0, 1, 1, 2, 3], [0, 3, 1, 7, 2, 5, 4], [False] * 7)
SPAN = 8
SAMPLED = Runner(sampled_model())
SETTINGS = {"temperature": 0.7, "top_k": 5}


class Guesses(Drafter):
    """Proposes the tree above with tokens that depend on the place in the text alone."""

    @dataclass(frozen=True)
    class Settings:
        """It has none."""

    max_nodes = SPAN

    def propose(self, state: State) -> Draft:
        """Tokens that were not drawn from a distribution that the rule could be told of."""
        nodes = len(TREE.parents)
        guesses = torch.randint(VOCABULARY, (64, nodes), generator=torch.Generator().manual_seed(0))
        tokens = guesses[state.length[:, 0]]
        tokens[:, :1] = state.last
        one = draft_of([TREE], tokens[:1], torch.zeros((1, 1), dtype=torch.int64), SPAN)
        alike = {name: getattr(one, name).expand_as(tokens) for name in ("parents", "valid", "candidate")}
        ahead = {name: state.length + getattr(one, name) for name in ("position", "slot")}
        return replace(one, tokens=tokens, **alike, **ahead)


def guessed(rows: int) -> Tensor:
    """The prompt continued many times with those trees, [rows, TOKENS]."""
    drafter = Guesses(SAMPLED, Guesses.Settings())
    rule = sampling_rule(SETTINGS)
    prompts = [PROMPT] * rows
    done = decode(SAMPLED, drafter, prompts, max_new_tokens=TOKENS, eos_token_ids=(), rule=rule)
    return torch.tensor([row.tokens for row in done])


def test_texts_from_trees_follow_the_models_own_distribution() -> None:
    tokens = guessed(ROWS)
    assert p_value(tokens, text_probabilities(SAMPLED.model, SETTINGS)) > LOWEST
    # And they are the very texts that plain sampling draws, but for rounding where a number is at an edge.
    plain = draws(SAMPLED, "autoregressive", sampling_rule(SETTINGS))
    assert (tokens != plain).any(dim=1).sum() <= 2


Plant = Callable[[pytest.MonkeyPatch], None]


def no_residual(patch: pytest.MonkeyPatch) -> None:
    """Children are accepted with p, and when all fail the token comes from p again."""
    follow, own = sampling.follow, Drawing.own
    told: dict[str, Any] = {}

    def remember(self: Drawing, state: State, shaped: Tensor, draft: Draft) -> Tensor:
        told["again"] = draw(shaped.softmax(dim=-1), self.numbers(draft.position + 1, ACCEPT))
        return own(self, state, shaped, draft)

    def wrong(choices: Tensor, logits: Tensor, draft: Draft) -> Outcome:
        outcome = follow(choices, logits, draft)
        for row, path in enumerate(outcome.path):
            outcome.tokens[row][-1] = int(told["again"][row, path[-1]])
        return outcome

    patch.setattr(Drawing, "own", remember)
    patch.setattr(sampling, "follow", wrong)


def one_number_for_all_places(patch: pytest.MonkeyPatch) -> None:
    """All nodes of a tree draw by the number of the root's place."""
    noise = sampling.gumbel_noise
    patch.setattr(
        sampling, "gumbel_noise", lambda numbers, like: noise(numbers[:, :1].expand_as(numbers), like)
    )


def unshaped(patch: pytest.MonkeyPatch) -> None:
    """The target's distribution is the one of a temperature of 1."""
    patch.setattr(Sampling, "shaped", lambda self, state, logits, draft: logits)


def argmax_of_the_last(patch: pytest.MonkeyPatch) -> None:
    """The bonus is the likeliest token."""
    follow = sampling.follow

    def wrong(choices: Tensor, logits: Tensor, draft: Draft) -> Outcome:
        outcome = follow(choices, logits, draft)
        for row, path in enumerate(outcome.path):
            outcome.tokens[row][-1] = int(logits[row, path[-1]].argmax())
        return outcome

    patch.setattr(sampling, "follow", wrong)


BUGS: dict[str, Plant] = {
    "no residual": no_residual,
    "one number serves all places of a tree": one_number_for_all_places,
    "p is not shaped": unshaped,
    "the bonus is not drawn": argmax_of_the_last,
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_chi_square_reports(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[bug](monkeypatch)
    assert p_value(guessed(ROWS // 4), text_probabilities(SAMPLED.model, SETTINGS)) < DECISIVE
