"""EAGLE with a bug in it: the output stays what it is, and the twin that drafts path by path sees the difference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.decoding.acceptance import Outcome, Rule
from eval.decoding.draft_layer import LayerState
from eval.decoding.drafters import eagle2
from eval.decoding.drafters.base import State
from eval.decoding.drafters.eagle import Eagle, HeadLayer
from eval.decoding.growing import Growing
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.static_tree import Layout
from eval.decoding.tree import Draft
from layerskip_model.context import Context
from tests.eval.decoding.eagle_heads import Fitted
from tests.eval.decoding.test_self_tree import run
from tests.eval.decoding.test_speculate import PROMPTS

LLAMA = Fitted()
NEW = 12
Plant = Callable[[pytest.MonkeyPatch], None]


def told(change: Callable[[Outcome], Outcome]) -> Plant:
    """What was accepted reaches the head in another form."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        advance = HeadLayer.advance
        patch.setattr(HeadLayer, "advance", lambda self, outcome: advance(self, change(outcome)))

    return plant


def first_nodes(outcome: Outcome) -> Outcome:
    """As if the accepted path were 0, 1, 2, ..."""
    return replace(outcome, path=[list(range(len(path))) for path in outcome.path])


def the_root_again(outcome: Outcome) -> Outcome:
    """The root's features for all that was accepted."""
    return replace(outcome, path=[path[:1] * len(path) for path in outcome.path])


def the_next_nodes_features(outcome: Outcome) -> Outcome:
    return replace(outcome, states={layer: found.roll(-1, dims=1) for layer, found in outcome.states.items()})


def tokens_of_the_drafts(outcome: Outcome) -> Outcome:
    """Each place is told its own token, not the one after it."""
    tokens = outcome.draft.tokens.tolist()
    own = [[row[node] for node in path] for row, path in zip(tokens, outcome.path, strict=True)]
    return replace(outcome, tokens=own)


def prompts_tokens_one_place_early(patch: pytest.MonkeyPatch) -> None:
    start = HeadLayer.start

    def wrong(self: HeadLayer, state: State, *rest: Any) -> None:
        shifted = copy.copy(state)
        shifted.texts = [text[:1] + text[:-1] for text in state.texts]
        start(self, shifted, *rest)

    patch.setattr(HeadLayer, "start", wrong)


def root_of_the_longest_row(patch: pytest.MonkeyPatch) -> None:
    """Drafts grow from the last place that was run, be it padding."""
    commit, extend = HeadLayer._commit, LayerState.extend
    made: list[Tensor] = []

    def noted(self: LayerState, *args: Any, **options: Any) -> Tensor:
        made.append(extend(self, *args, **options))
        return made[-1]

    def wrong(self: HeadLayer, *args: Any) -> None:
        commit(self, *args)
        self.root = made[-1][:, -1:]

    patch.setattr(LayerState, "extend", noted)
    patch.setattr(HeadLayer, "_commit", wrong)


def extended(change: Callable[[LayerState, list[int]], list[int]]) -> Plant:
    """Other counts for what enters the head's cache."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        extend = LayerState.extend

        def wrong(self: LayerState, inputs: Tensor, counts: list[int], **options: Any) -> Tensor:
            return extend(self, inputs, change(self, counts), **options)

        patch.setattr(LayerState, "extend", wrong)

    return plant


def padding_stays(state: LayerState, counts: list[int]) -> list[int]:
    """Of the prompts: it is not cut off."""
    return [max(counts)] * len(counts) if max(state.lengths) == 0 else counts


def only_one_stays(state: LayerState, counts: list[int]) -> list[int]:
    return counts if max(state.lengths) == 0 else [min(count, 1) for count in counts]


def root_twice(patch: pytest.MonkeyPatch) -> None:
    """The root is committed where it stands, and drafts begin after it as if it were one of them."""
    extend = LayerState.extend
    patch.setattr(LayerState, "extend", lambda self, inputs, counts, **_: extend(self, inputs, counts))


def chain_a_place_late(patch: pytest.MonkeyPatch) -> None:
    context = State.chain_context

    def wrong(self: State, first: int, count: int) -> Context:
        late = isinstance(self, LayerState) and count == 1 and first > 0
        return context(self, first + int(late and first < 3), count)

    patch.setattr(State, "chain_context", wrong)


def tree_seen(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Plant:
    """Other levels of the head's nodes, or others whom they see."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        context = LayerState.tree_context

        def wrong(self: LayerState, level: Tensor, visible: Tensor, *nodes: int) -> Context:
            return context(self, *change(level, visible), *nodes)

        patch.setattr(LayerState, "tree_context", wrong)

    return plant


def a_level_deeper(level: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    return level + 1, visible


def no_level(level: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(level), visible


def all_before(level: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Not ancestors alone."""
    return level, torch.ones_like(visible).tril()


def no_ancestors(level: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Each node sees what is committed and itself."""
    return level, torch.eye(visible.shape[1], dtype=torch.bool).expand_as(visible)


def features_of_another_parent(patch: pytest.MonkeyPatch) -> None:
    """Of static and of dynamic trees."""
    made, expand = Layout.__init__, Growing.expand

    def wrong_layout(self: Layout, *args: Any) -> None:
        made(self, *args)
        self.inner_parents = self.inner_parents.clamp(max=1)

    def wrong_growing(self: Growing, *args: Tensor) -> None:
        expand(self, *args)
        if self.first > 1:  # the root's children have no other
            self.below = self.below.roll(1, dims=1)

    patch.setattr(Layout, "__init__", wrong_layout)
    patch.setattr(Growing, "expand", wrong_growing)


def features_before_the_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HeadLayer, "features", lambda self, states: states[self.needs[0]])


def made(change: Callable[[HeadLayer], None]) -> Plant:
    """Something of the head is read wrongly."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        make = HeadLayer.__init__

        def wrong(self: HeadLayer, *args: Any) -> None:
            make(self, *args)
            change(self)

        patch.setattr(HeadLayer, "__init__", wrong)

    return plant


def outputs_of_the_layers(layer: HeadLayer) -> None:
    """What leaves the layers in place of what enters them."""
    layer.needs = tuple(number + 1 for number in layer.needs)
    head: Any = copy.copy(layer.head)
    head.reads = tuple(number + 1 for number in head.reads)
    layer.head = head


def layers_backwards(layer: HeadLayer) -> None:
    layer.needs = layer.needs[::-1]


def first_words(layer: HeadLayer) -> None:
    """The reduced vocabulary is taken for the target's first tokens."""
    assert layer._vocabulary is not None
    layer._vocabulary = torch.arange(len(layer._vocabulary))


def scores_that_are_no_probabilities(patch: pytest.MonkeyPatch) -> None:
    def wrong(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
        values, tokens = logits.topk(width)
        return values - values.amax(dim=-1, keepdim=True), tokens

    patch.setattr(eagle2, "likeliest", wrong)


def drafts_beyond_the_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(State, "has_room", lambda self, ahead: self._true[:, :1].expand(self.batch, 1))


def noise_of_the_roots_place(patch: pytest.MonkeyPatch) -> None:
    """For every node of a dynamic tree."""
    so_far = eagle2.made_so_far

    def wrong(state: State, growing: Growing) -> Draft:
        draft = so_far(state, growing)
        return replace(draft, position=state.length.expand_as(draft.position))

    patch.setattr(eagle2, "made_so_far", wrong)


def noise_as_in_a_chain(patch: pytest.MonkeyPatch) -> None:
    """Each node of a static tree stands a place after the one before it."""
    tree = Eagle.tree

    def wrong(self: Eagle, state: State, tokens: Tensor, depth: int) -> Draft:
        return state.chain(tokens) if depth < self.layout.depth else tree(self, state, tokens, depth)

    patch.setattr(Eagle, "tree", wrong)


CHAINS, TREES = ("eagle2, chain", "eagle3, chain"), ("eagle, tree", "eagle2, tree", "eagle3, tree")
BUGS: list[tuple[Plant, tuple[str, ...]]] = [
    (told(first_nodes), ("eagle, tree", "eagle2, tree", "eagle3, tree")),
    (told(the_root_again), (*CHAINS, *TREES)),
    (told(the_next_nodes_features), (*CHAINS, *TREES)),
    (told(tokens_of_the_drafts), (*CHAINS, *TREES)),
    (prompts_tokens_one_place_early, (*CHAINS, *TREES)),
    (root_of_the_longest_row, (*CHAINS, *TREES)),
    (extended(padding_stays), (*CHAINS, *TREES)),
    (extended(only_one_stays), (*CHAINS, *TREES)),
    (root_twice, ("eagle2, chain", *TREES)),
    (chain_a_place_late, CHAINS),
    (tree_seen(a_level_deeper), TREES),
    (tree_seen(no_level), TREES),
    (tree_seen(all_before), TREES),
    (tree_seen(no_ancestors), TREES),
    (features_of_another_parent, TREES),
    (features_before_the_norm, ("eagle, tree", "eagle2, chain")),
    (made(outputs_of_the_layers), ("eagle3, chain",)),
    (made(layers_backwards), ("eagle3, tree",)),
    (made(first_words), ("eagle3, chain", "eagle3, tree")),
    (scores_that_are_no_probabilities, ("eagle2, tree", "eagle3, tree")),
    (drafts_beyond_the_room, ("eagle2, tree", "eagle, tree")),
]


def is_lossless(case: str) -> bool:
    rows = run(LLAMA.runner, LLAMA.drafter(case), PROMPTS, max_new_tokens=NEW)
    return [row.tokens for row in rows] == [future[:NEW] for future in LLAMA.future]


@pytest.mark.parametrize("case", [*CHAINS, *TREES])
def test_without_bugs_the_checks_are_content(case: str) -> None:
    assert is_lossless(case)
    LLAMA.check_drafts(case, new=NEW)


@pytest.mark.parametrize(
    ("bug", "case"),
    [
        pytest.param(bug, case, id=f"{number}, {case}")
        for number, (bug, cases) in enumerate(BUGS)
        for case in cases
    ],
)
def test_the_naive_twin_reports(bug: Plant, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drafted wrongly costs speed and nothing else."""
    bug(monkeypatch)
    assert is_lossless(case)
    with pytest.raises(AssertionError):
        LLAMA.check_drafts(case, new=NEW)


@pytest.mark.parametrize(
    ("bug", "case"),
    [
        (noise_of_the_roots_place, "eagle2, tree"),
        (noise_of_the_roots_place, "eagle3, tree"),
        (noise_as_in_a_chain, "eagle, tree"),
    ],
)
def test_a_rule_that_is_told_of_another_place_is_seen(
    bug: Plant, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tokens are drawn: those that are drafted are no longer those that are foreseen."""
    rule: Rule = Sampling(Shaping({}, (), 64), 3)
    LLAMA.check_drafts(case, new=NEW, rule=rule)
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        LLAMA.check_drafts(case, new=NEW, rule=rule)
