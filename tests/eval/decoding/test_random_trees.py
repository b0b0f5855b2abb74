"""Any tree is verified right: logits, cache and text, under every rule, in batches; and the checks find bugs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eval.decoding import acceptance, sampling
from eval.decoding.acceptance import Greedy, Outcome, Rule
from eval.decoding.cache import Cache
from eval.decoding.drafters import base
from eval.decoding.drafters.autoregressive import Autoregressive
from eval.decoding.drafters.base import State
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.speculate import Generation, decode
from eval.decoding.tree import Draft
from eval.decoding.typical import Typical
from layerskip_model.context import Context
from layerskip_model.runner import Runner
from tests.eval.decoding.trees import Tree, Trees, random_tree
from tests.tiny_models import tiny_model

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12]]
NEW = 9
SPAN = 9
WINDOW = {"sliding_window": 3}  # shorter than trees are deep: what it hides goes by position, not by slot
CHANGES: dict[str, dict[str, Any]] = {"llama": {}, "mistral": WINDOW, "gemma2": WINDOW, "gemma3": WINDOW}


@cache
def runner_of(kind: str) -> Runner:
    return Runner(tiny_model(kind, **CHANGES[kind]))


def rule_of(name: str) -> Rule:
    shaping = Shaping({"temperature": 0.7, "top_p": 0.95}, (), 64)
    if name == "typical":
        return Typical(shaping, 5, threshold=0.09, alpha=0.3)
    return Greedy() if name == "greedy" else Sampling(shaping, 5)


@cache
def future_of(kind: str, name: str) -> list[list[int]]:
    """What autoregressive decoding says, further than any tree looks."""
    drafter = Autoregressive(runner_of(kind), Autoregressive.Settings())
    rows = decode(
        runner_of(kind),
        drafter,
        PROMPTS,
        max_new_tokens=NEW + SPAN,
        eos_token_ids=(),
        rule=rule_of(name),
        streams=[7, 2],
    )
    return [row.tokens for row in rows]


def run(
    kind: str, name: str, forest: list[list[Tree]], entry: int, random: Random, **options: Any
) -> list[Generation]:
    runner = runner_of(kind)
    trees = Trees(runner, forest, future_of(kind, name), entry, random)
    options = {"max_new_tokens": NEW, "eos_token_ids": (), **options}
    return decode(runner, trees, PROMPTS, rule=rule_of(name), streams=[7, 2], **options)


def random_forest(random: Random, nodes: int, count: int = 3) -> list[list[Tree]]:
    """Trees with gaps, one for each prompt, of `count` steps."""
    return [[random_tree(random, nodes, SPAN) for _ in PROMPTS] for _ in range(count)]


@pytest.mark.parametrize("kind", CHANGES)
@settings(max_examples=20, deadline=None)
@given(
    random=st.randoms(use_true_random=False),
    nodes=st.integers(1, SPAN),
    entry=st.integers(0, 3),
    name=st.sampled_from(["greedy", "sampling", "typical"]),
)
def test_any_tree_is_verified_right(kind: str, random: Random, nodes: int, entry: int, name: str) -> None:
    rows = run(kind, name, random_forest(random, nodes), entry, random)
    assert [len(row.tokens) for row in rows] == [NEW, NEW]
    if name != "typical":
        assert [row.tokens for row in rows] == [tokens[:NEW] for tokens in future_of(kind, name)]


CHAIN = Tree([-1, 0, 1, 2, 3], [-1, 0, 1, 2, 3], [0, 1, 2, 3, 4], [False] * 5)
ONE = Tree([-1], [-1], [0], [False])


@pytest.mark.parametrize("tree", [CHAIN, ONE], ids=["chain", "one node"])
@pytest.mark.parametrize("name", ["greedy", "sampling"])
def test_chains_and_single_nodes_are_trees(tree: Tree, name: str) -> None:
    rows = run("llama", name, [[tree, tree]], 2, Random(0))
    assert [row.tokens for row in rows] == [tokens[:NEW] for tokens in future_of("llama", name)]
    accepted = [row.accepted for row in rows]
    assert all(accepted) if tree is CHAIN else not any(accepted)


@pytest.mark.parametrize("name", ["greedy", "sampling"])
def test_rows_end_early_and_at_the_end_of_the_context(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row has room for 4 tokens, the second for 8, of which it says 5."""
    future = future_of("llama", name)
    monkeypatch.setattr(runner_of("llama"), "context_length", len(PROMPTS[0]) + 4)
    ends = [token for place, token in enumerate(future[1]) if place >= 4 and token not in future[0][:4]]
    end = next(token for token in ends if token not in future[1][: future[1].index(token)])
    rows = run("llama", name, random_forest(Random(3), 7), 1, Random(3), eos_token_ids=[end])
    second = future[1][: future[1].index(end) + 1][:8]
    assert [row.tokens for row in rows] == [future[0][:4], second]
    assert rows[0].finish_reason == "context"


def fixed_runs(name: str) -> Iterator[list[Generation]]:
    """Forests in which rows accept paths of several lengths, with riders, gaps and padding."""
    for seed in (9, 10, 12):
        yield run("mistral", name, random_forest(Random(seed), 8, 5), 2, Random(seed))


def trees_are_right(name: str) -> bool:
    """Logits, caches and texts of those."""
    expected = [tokens[:NEW] for tokens in future_of("mistral", name)]
    try:
        return all([row.tokens for row in rows] == expected for rows in fixed_runs(name))
    except AssertionError:
        return False


def text_is_right(name: str) -> bool:
    """The texts alone, as anybody sees it who compares strategies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trees, "advance", lambda self, outcome: setattr(self, "steps", self.steps + 1))
        return trees_are_right(name)


def test_without_bugs_the_checks_are_content() -> None:
    for name in ("greedy", "sampling"):
        assert trees_are_right(name)
        assert text_is_right(name)
        lengths = {length for rows in fixed_runs(name) for row in rows for length in row.accepted_lengths}
        assert lengths >= {1, 2, 3, 4}


Plant = Callable[[pytest.MonkeyPatch], None]


def unreached_nodes_count(patch: pytest.MonkeyPatch) -> None:
    """The rule takes the deepest node that agrees with its parent, whoever its ancestors are."""

    def wrong(fits: list[bool], parents: list[int], merit: Any = None) -> list[int]:
        paths = [acceptance_path(parents, node) for node in range(len(parents)) if node == 0 or fits[node]]
        return max((path for path in paths if path[0] == 0), key=len)

    patch.setattr(acceptance, "longest_path", wrong)


def acceptance_path(parents: list[int], node: int) -> list[int]:
    return [*acceptance_path(parents, parents[node]), node] if parents[node] >= 0 else [node]


def riders_are_accepted(patch: pytest.MonkeyPatch) -> None:
    follow = acceptance.follow

    def wrong(choices: Tensor, logits: Tensor, draft: Draft) -> Outcome:
        return follow(choices, logits, replace(draft, candidate=torch.ones_like(draft.candidate)))

    patch.setattr(acceptance, "follow", wrong)
    patch.setattr(sampling, "follow", wrong)


def nodes_see_all_before_them(patch: pytest.MonkeyPatch) -> None:
    context = State.context

    def wrong(self: State, draft: Draft, first: int = 0, stop: int | None = None) -> Context:
        all_before = torch.ones((*draft.tokens.shape, draft.num_nodes), dtype=torch.bool).tril()
        return context(self, replace(draft, visible=all_before), first, stop)

    patch.setattr(State, "context", wrong)


def seen_as(change: Callable[[State, Draft], dict[str, Tensor]]) -> Plant:
    """The verification sees another draft than the rule and the cache."""
    context = State.context

    def wrong(self: State, draft: Draft, first: int = 0, stop: int | None = None) -> Context:
        return context(self, replace(draft, **change(self, draft)), first, stop)  # type: ignore[arg-type]

    return lambda patch: patch.setattr(State, "context", wrong)


def in_order(state: State, draft: Draft) -> dict[str, Tensor]:
    """Slots without gaps."""
    return {"slot": state.length + torch.arange(draft.num_nodes).expand_as(draft.slot)}


def nothing_is_moved(patch: pytest.MonkeyPatch) -> None:
    keep = Cache.keep
    patch.setattr(Cache, "keep", lambda self, path, slot=None: keep(self, path, None))


def mask_over_nodes(patch: pytest.MonkeyPatch) -> None:
    """The mask is taken to be one over slots already."""

    def wrong(visible: Tensor, slot: Tensor, span: int) -> Tensor:
        return torch.nn.functional.pad(visible, (0, span - visible.shape[2]))

    patch.setattr(base, "by_slot", wrong)


BUGS: dict[str, Plant] = {
    "rule: ancestors need not be accepted": unreached_nodes_count,
    "rule: riders are accepted": riders_are_accepted,
    "mask: nodes see all nodes before them": nodes_see_all_before_them,
    "mask: nodes are taken for slots": mask_over_nodes,
    "positions: by slot, not by depth": seen_as(lambda state, draft: {"position": draft.slot}),
    "positions: siblings follow one another": seen_as(
        lambda state, draft: {"position": state.length + torch.arange(draft.num_nodes).expand_as(draft.slot)}
    ),
    "slots: written without the gaps": seen_as(in_order),
    "slots: the accepted path is not moved": nothing_is_moved,
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("name", ["greedy", "sampling"])
def test_planted_bugs_are_found(bug: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    future_of("mistral", name)  # before the bug is in
    BUGS[bug](monkeypatch)
    assert not trees_are_right(name)
    assert not text_is_right(name)


def test_a_number_that_serves_two_places_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling: all nodes of a tree draw by the number of the root's place."""
    future_of("mistral", "sampling")
    noise = sampling.gumbel_noise
    monkeypatch.setattr(
        sampling, "gumbel_noise", lambda numbers, like: noise(numbers[:, :1].expand_as(numbers), like)
    )
    assert not trees_are_right("sampling")
