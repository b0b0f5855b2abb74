"""Typical acceptance against its definition, at its two ends, and in what it does to the distribution."""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.decoding import sampling
from eval.decoding.acceptance import Outcome
from eval.decoding.sampling import OWN, Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from eval.decoding.tree import Draft
from eval.decoding.typical import ALPHA, THRESHOLD, Typical
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.eval.decoding import test_sampling
from tests.eval.decoding.sampled import (
    DECISIVE,
    LOWEST,
    VOCABULARY,
    draws,
    p_value,
    sampled_model,
    text_probabilities,
)
from tests.eval.decoding.test_sampling import chain, naive_draw, stub_state
from tests.eval.decoding.trees import Tree, all_paths, draft_of, random_tree
from tests.tiny_models import agreeing_model

AGREEING = Runner(agreeing_model())
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17]]
DRAFTING = {"exit_layer": 1, "num_speculations": 3}


def naive_accept(
    p: list[list[float]], tokens: list[int], tree: Tree, numbers: list[float], threshold: float, alpha: float
) -> tuple[list[int], list[int]]:
    """Look at all paths of one row's tree; the path taken and the tokens won. numbers[depth]: the own token's."""

    def likely(parent: int, node: int) -> bool:
        entropy = -sum(share * math.log(share) for share in p[parent] if share > 0)
        return p[parent][tokens[node]] > min(threshold, alpha * math.exp(-entropy))

    kept = [
        path
        for path in all_paths(tree.parents)
        if not any(tree.riders[node] for node in path)
        and all(likely(parent, node) for parent, node in pairwise(path))
    ]
    longest = [path for path in kept if len(path) == max(map(len, kept))]
    likelihood = [
        sum(math.log(p[parent][tokens[node]]) for parent, node in pairwise(path)) for path in longest
    ]
    path = longest[likelihood.index(max(likelihood))]
    return path, [tokens[node] for node in path[1:]] + [naive_draw(p[path[-1]], numbers[len(path) - 1])]


class Numbered(Typical):
    """The target's own token is drawn by its place's one number."""

    own = test_sampling.Numbered.own
    own_at = test_sampling.Numbered.own_at


def accept_with(
    numbers: Tensor, p: Tensor, draft: Draft, patch: pytest.MonkeyPatch, *limits: float
) -> Outcome:
    """The rule's verdict with these numbers [rows, places, 3]; p [rows, n, vocab]."""
    patch.setattr(sampling, "random_numbers", lambda *_: numbers.numpy())
    rule = Numbered(Shaping({}, (), p.shape[2]), 0, *limits)
    state = stub_state(len(numbers), numbers.shape[1])
    rule.begin(state)
    return rule.accept(state, p.log(), draft)


@pytest.mark.parametrize("limits", [(THRESHOLD, ALPHA), (0.3, 0.9), (0.02, 5.0), (0.0, 0.3), (1.0, 0.05)])
def test_the_rule_equals_its_definition(limits: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """On random trees with riders and padding, some tokens impossible."""
    rows, nodes, vocabulary = 200, 7, 5
    random = Random(1)
    generator = torch.Generator().manual_seed(1)
    trees = [random_tree(random, nodes, 9) for _ in range(rows)]
    p = torch.rand((rows, nodes, vocabulary), generator=generator, dtype=torch.float64).pow(4)
    p[torch.rand(p.shape, generator=generator) < 0.2] = 0.0
    p[..., 0] += 1e-3
    p = p / p.sum(dim=2, keepdim=True)
    tokens = torch.randint(vocabulary, (rows, nodes), generator=generator)
    numbers = torch.rand((rows, nodes + 1, 3), generator=generator, dtype=torch.float64)
    draft = draft_of(trees, tokens, torch.zeros((rows, 1), dtype=torch.int64), 9)
    outcome = accept_with(numbers, p, draft, monkeypatch, *limits)
    for row, tree in enumerate(trees):
        expected = naive_accept(
            p[row].tolist(), tokens[row].tolist(), tree, numbers[row, :, OWN].tolist(), *limits
        )
        assert (outcome.path[row], outcome.tokens[row]) == expected
        up = [node for node in range(1, nodes) if not tree.riders[node] and not tree.padding[node]]
        assert outcome.drafted[row] == len(up)
    lengths = {len(path) for path in outcome.path}
    assert lengths >= {1, 2, 3}


def test_of_paths_alike_in_length_the_likeliest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree([-1, 0, 0, 1, 2], [-1, 0, 0, 1, 2], [0, 1, 2, 3, 4], [False] * 5)
    tokens = torch.tensor([[0, 1, 2, 1, 2]])
    p = torch.tensor([[[0.2, 0.5, 0.3], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [1, 0, 0], [0, 1, 0]]]).double()
    numbers = torch.full((1, 6, 3), 0.5, dtype=torch.float64)
    draft = draft_of([tree], tokens, torch.zeros((1, 1), dtype=torch.int64), 5)
    outcome = accept_with(numbers, p, draft, monkeypatch, 0.09, 0.3)  # 0.5 * 0.3 < 0.3 * 0.7
    assert (outcome.path, outcome.tokens) == ([[0, 2, 4]], [[2, 2, 1]])


def test_a_draft_that_just_reaches_the_threshold_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]).double()
    numbers = torch.full((1, 3, 3), 0.1, dtype=torch.float64)
    draft = chain(torch.tensor([[0, 1]]), None)
    assert accept_with(numbers, p, draft, monkeypatch, 0.5, 9.0).tokens == [[0]]
    assert accept_with(numbers, p, draft, monkeypatch, 0.4999, 9.0).tokens == [[1, 0]]


def run(rule: Any, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Generation]:
    name, settings = options.pop("strategy", ("self_speculative", DRAFTING))
    options = {"max_new_tokens": 16, "eos_token_ids": (), "streams": range(len(prompts)), **options}
    return decode(AGREEING, make_drafter(name, AGREEING, **settings), prompts, rule=rule, **options)


def typical(settings: dict[str, Any], threshold: float = THRESHOLD, alpha: float = ALPHA) -> Typical:
    return Typical(Shaping(settings, (), 64), 0, threshold, alpha)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"temperature": 1e-4}], ids=str)
def test_where_one_token_is_likely_it_is_greedy(settings: dict[str, Any]) -> None:
    drafter = make_drafter("self_speculative", AGREEING, **DRAFTING)
    greedy = decode(AGREEING, drafter, PROMPTS, max_new_tokens=16, eos_token_ids=())
    for row, plain in zip(run(typical(settings)), greedy, strict=True):
        assert (row.tokens, row.accepted_lengths) == (plain.tokens, plain.accepted_lengths)


def test_a_threshold_that_nothing_exceeds_is_plain_sampling() -> None:
    """Token by token: every one is the target's own, by its place's number."""
    settings = {"temperature": 0.8}
    plain = run(Sampling(Shaping(settings, (), 64), 0), strategy=("autoregressive", {}))
    rows = run(typical(settings, 1.0, math.exp(9)))
    assert [row.tokens for row in rows] == [row.tokens for row in plain]
    assert all(row.accepted == 0 < row.drafted for row in rows)
    # Without drafts the threshold does not matter.
    assert [row.tokens for row in run(typical(settings), strategy=("autoregressive", {}))] == [
        row.tokens for row in plain
    ]


def test_a_threshold_of_0_takes_all_that_is_possible() -> None:
    rows = run(typical({"temperature": 0.8}, 0.0))
    assert all(row.accepted == row.drafted > 0 for row in rows)


@pytest.mark.parametrize("context", [128, 14])
def test_a_row_depends_on_its_stream_and_not_on_its_batch(
    context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AGREEING, "context_length", context)
    rule = typical({"temperature": 1.5}, 0.3, 3.0)
    together = run(rule, streams=[5, 0, 9])
    for row, prompt, stream in zip(together, PROMPTS, [5, 0, 9], strict=True):
        alone = run(rule, [prompt], streams=[stream])[0]
        assert (row.tokens, row.accepted_lengths) == (alone.tokens, alone.accepted_lengths)
    drafted, accepted = (sum(getattr(row, name) for row in together) for name in ("drafted", "accepted"))
    assert 0 < accepted < drafted


def test_the_distribution_is_not_the_targets() -> None:
    """Drafts of a decoder that has none leave it as it is."""
    runner = Runner(sampled_model())
    settings = {"temperature": 0.7}
    rule = Typical(Shaping(settings, (), VOCABULARY), 0, THRESHOLD, ALPHA)
    expected = text_probabilities(runner.model, settings)
    drafting = {"exit_layer": 1, "num_speculations": 2}
    assert p_value(draws(runner, "self_speculative", rule, 5000, **drafting), expected) < DECISIVE
    assert p_value(draws(runner, "autoregressive", rule, 5000), expected) > LOWEST


def test_drafts_that_were_drawn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.zeros((1, 4, 3), dtype=torch.float64)
    p = torch.full((1, 3, 2), 0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match="drawn"):
        accept_with(numbers, p, chain(torch.tensor([[0, 1, 1]]), p[:, :2]), monkeypatch, 0.09, 0.3)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_row_that_nothing_can_follow_is_an_error_unless_it_has_ended(value: float) -> None:
    rule = Typical(Shaping({}, (), 3), 0, THRESHOLD, ALPHA)
    state = stub_state(2, 2)
    rule.begin(state)
    logits = torch.tensor([[[0.0, 1.0, 2.0]], [[value] * 3]])
    root = chain(torch.zeros((2, 1), dtype=torch.int64), None)
    with pytest.raises(UserError, match="prompt 1: no token has a probability"):
        rule.accept(state, logits, root)
    state.finished = [False, True]
    assert len(rule.accept(state, logits, root).tokens) == 2


def test_a_step_reads_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data cannot be read at all: drafting does not try to, accepting does once."""
    with torch.device("meta"):
        state = stub_state(2, 4)
        token, logits = torch.zeros((2, 1), dtype=torch.int64), torch.zeros((2, 1, 6))
    rule = typical({"temperature": 0.7, "top_k": 3})
    rule.begin(state)
    first, q = rule.draft(state, logits, [token])
    assert q is None
    read = []

    def tolist(tensor: Tensor) -> list[list[list[float]]]:
        read.append(tensor.shape)
        # By row: tokens, own tokens, parents, whether up for acceptance, merits.
        return [[[0.0, 3.0], [1.0, 4.0], [-1.0, 0.0], [1.0, 1.0], [0.0, -0.5]]] * 2

    monkeypatch.setattr(Tensor, "tolist", tolist)
    outcome = rule.accept(state, logits.expand(2, 2, 6), chain(torch.cat([token, first], dim=1), None))
    assert read == [(2, 5, 2)]
    assert outcome.tokens == [[3, 4]] * 2
