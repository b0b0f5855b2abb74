"""Hydra with a bug in it: the output stays what it is, and the twin that drafts path by path sees the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from eval.decoding.acceptance import Outcome
from eval.decoding.draft_layer import LayerState
from eval.decoding.drafters.base import State
from eval.decoding.drafters.hydra import Hydra
from eval.decoding.static_tree import Layout
from eval.decoding.tree import Draft
from tests.eval.decoding.hydra_heads import hydra
from tests.eval.decoding.medusa_heads import WIDE
from tests.eval.decoding.test_hydra import PREFIX, drafts_what_separate_paths_do
from tests.eval.decoding.test_self_tree import run
from tests.eval.decoding.test_speculate import PROMPTS

Plant = Callable[[pytest.MonkeyPatch], None]


def parent_of_the_first_node(patch: pytest.MonkeyPatch) -> None:
    """All children of a level are those of its first inner node."""
    made = Layout.__init__

    def wrong(self: Layout, *args: Any) -> None:
        made(self, *args)
        self._after_inner = [
            nodes % width for nodes, width in zip(self._after_inner, self._widths, strict=True)
        ]

    patch.setattr(Layout, "__init__", wrong)


def path_of_the_first_node(patch: pytest.MonkeyPatch) -> None:
    """All nodes of a level are drafted after the path to its first inner node."""
    made = Layout.__init__

    def wrong(self: Layout, *args: Any) -> None:
        made(self, *args)
        self.path_to_inner = [way[:1].expand_as(way) for way in self.path_to_inner]

    patch.setattr(Layout, "__init__", wrong)


def path_backwards(patch: pytest.MonkeyPatch) -> None:
    made = Layout.__init__

    def wrong(self: Layout, *args: Any) -> None:
        made(self, *args)
        self.path_to_inner = [way.flip(1) for way in self.path_to_inner]

    patch.setattr(Layout, "__init__", wrong)


def extended(change: Callable[[LayerState, list[int]], list[int]]) -> Plant:
    """Other counts for what enters the draft layer."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        extend = LayerState.extend

        def wrong(self: LayerState, inputs: Tensor, counts: list[int]) -> Tensor:
            return extend(self, inputs, change(self, counts))

        patch.setattr(LayerState, "extend", wrong)

    return plant


def padding_stays(state: LayerState, counts: list[int]) -> list[int]:
    """Of the prompts: it is not cut off."""
    return [max(counts)] * len(counts) if max(state.lengths) == 0 else counts


def only_the_root_stays(state: LayerState, counts: list[int]) -> list[int]:
    return counts if max(state.lengths) == 0 else [min(count, 1) for count in counts]


def state_of_the_root(patch: pytest.MonkeyPatch) -> None:
    """In place of the last accepted node's."""
    advance = Hydra.advance

    def wrong(self: Hydra, outcome: Outcome) -> None:
        paths = list(outcome.path)
        outcome.path[:] = [path[:1] for path in paths]
        advance(self, outcome)
        outcome.path[:] = paths

    patch.setattr(Hydra, "advance", wrong)


def first_nodes_in_place_of_accepted_ones(patch: pytest.MonkeyPatch) -> None:
    """As if the accepted path were 0, 1, 2, ..."""
    advance = Hydra.advance

    def wrong(self: Hydra, outcome: Outcome) -> None:
        paths = list(outcome.path)
        outcome.path[:] = [list(range(len(path))) for path in paths]
        advance(self, outcome)
        outcome.path[:] = paths

    patch.setattr(Hydra, "advance", wrong)


def rule_is_told_of_a_chain(patch: pytest.MonkeyPatch) -> None:
    """What stands before a node is taken for its path."""
    tree = Hydra.tree

    def wrong(self: Hydra, state: State, tokens: Tensor, depth: int) -> Draft:
        return state.chain(tokens) if depth < self.layout.depth else tree(self, state, tokens, depth)

    patch.setattr(Hydra, "tree", wrong)


def is_lossless() -> bool:
    return [row.tokens for row in run(PREFIX.runner, hydra(PREFIX.runner, PREFIX.heads, WIDE), PROMPTS)] == (
        PREFIX.future
    )


def test_without_bugs_the_checks_are_content() -> None:
    assert is_lossless()
    assert drafts_what_separate_paths_do()


@pytest.mark.parametrize(
    "bug",
    [
        parent_of_the_first_node,
        path_of_the_first_node,
        path_backwards,
        extended(padding_stays),
        extended(only_the_root_stays),
        state_of_the_root,
        first_nodes_in_place_of_accepted_ones,
    ],
)
def test_the_naive_twin_reports(bug: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drafted wrongly costs speed and nothing else."""
    bug(monkeypatch)
    assert is_lossless()
    assert not drafts_what_separate_paths_do()


def test_a_rule_that_is_told_of_another_text_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rule_is_told_of_a_chain(monkeypatch)
    assert not drafts_what_separate_paths_do(no_repeats=True)
