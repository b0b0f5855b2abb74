"""What steps cost: the sizes that are measured, what lies between them, and a bench on which every step is the same."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from eval import tree_costs
from eval.decoding.acceptance import Greedy
from eval.decoding.growing import Shape
from eval.decoding.static_tree import TreeShape
from eval.target import Target
from eval.tree_costs import (
    REPEATS,
    WARM_UPS,
    Costs,
    between,
    measure_costs,
    rising,
    sizes_to_measure,
    usual,
)
from tests.eval.decoding.medusa_heads import CHAIN, WIDE, medusa, random_heads

TEXT = [3, 4, 5, 6, 7, 8, 9]


def test_sizes_are_those_of_round_numbers_of_rows() -> None:
    assert sizes_to_measure(63) == [1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63]
    assert sizes_to_measure(20) == [1, 2, 3, 5, 7, 11, 15, 20]
    assert sizes_to_measure(1) == [1]


def test_between_measured_sizes_lies_a_straight_line() -> None:
    curve = {1: 2.0, 3: 4.0, 7: 4.0}
    assert [between(curve, at) for at in (0, 1, 2, 3, 5, 7, 9)] == [2.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0]


def test_more_rows_cost_no_less() -> None:
    assert rising({1: 1.0, 2: 3.0, 3: 2.0, 5: 4.0}) == {1: 1.0, 2: 2.5, 3: 2.5, 5: 4.0}
    assert rising({2: 3.0, 1: 4.0, 3: 2.0}) == {1: 3.0, 2: 3.0, 3: 3.0}
    assert rising({1: 1.0, 2: 1.0}) == {1: 1.0, 2: 1.0}


def test_a_chain_has_costs_of_its_own_and_trees_those_of_their_depth_and_size() -> None:
    costs = Costs(
        plain=1.0,
        chain_verify={1: 1.1, 2: 1.2},
        chain_draft={1: 0.1, 2: 0.2},
        tree_verify={3: 2.0, 5: 3.0},
        tree_draft={1: {3: 0.3}, 2: {3: 0.4, 5: 0.6}},
    )
    assert costs.of(TreeShape.chain(2)) == (0.2, 1.2)
    tree = TreeShape("", ((0,), (1,), (0, 0), (2,)))
    assert costs.of(tree) == pytest.approx((0.5, 2.5))
    assert costs.of(tree.cut(depth=1)) == pytest.approx((0.3, 2.0))


def test_a_growing_tree_is_drafted_by_its_width_and_depth() -> None:
    """How many nodes are kept of it matters to verification only."""
    costs = Costs(1.0, {5: 1.5}, {5: 0.5}, {7: 2.0, 15: 4.0}, {2: {2: 0.2, 6: 0.6}})
    assert costs.of(Shape(4, 2, 11)) == pytest.approx((0.4, 3.0))
    assert costs.of(Shape(5, 1, 5)) == (0.5, 1.5)
    assert (costs.at_least(5), costs.at_least(8)) == (2.0, 2.0)


def test_costs_of_another_time_are_told_in_the_same_plain_steps() -> None:
    early = Costs(1.0, {1: 1.0}, {1: 0.1}, {3: 1.5}, {2: {2: 0.2}}, length=9)
    late = Costs(2.0, {}, {}, {7: 2.0, 15: 8.0}, {3: {2: 0.8}})
    both = early.with_trees(late)
    assert (both.plain, both.chain_verify, both.length) == (1.0, {1: 1.0}, 9)
    assert both.tree_verify == {3: 1.25, 7: 1.25, 15: 4.0}  # more rows cost no less
    assert both.tree_draft == {2: {2: 0.2}, 3: {2: 0.4}}


def test_a_step_takes_what_it_takes_undisturbed() -> None:
    assert usual([9.0, 1.0, 9.0, 1.0, 1.0, 9.0, 9.0]) == 1.0


def test_every_step_is_the_same(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps went before, each drafts and verifies after the same text; a plain one gives its own token."""
    heads = random_heads(tiny_target.model)
    runner = tiny_target.runner
    seen: dict[int, list[Any]] = {}
    verify = tree_costs.verify

    def noting(state: Any, drafter: Any, draft: Any) -> Any:
        result = verify(state, drafter, draft)
        seen.setdefault(draft.num_nodes, []).append((draft.tokens, draft.position, result[0]))
        return result

    monkeypatch.setattr(tree_costs, "verify", noting)
    shapes = [CHAIN, WIDE]
    costs = measure_costs(
        tiny_target, lambda shape: medusa(runner, heads, cast(TreeShape, shape)), shapes, TEXT, Greedy()
    )
    assert {nodes: len(steps) for nodes, steps in seen.items()} == dict.fromkeys(
        (1, 4, 11), REPEATS + WARM_UPS
    )
    with torch.inference_mode():
        first = tiny_target.model(input_ids=torch.tensor([TEXT])).logits[0, -1].argmax()
        second = tiny_target.model(input_ids=torch.tensor([[*TEXT, int(first)]])).logits[0, -1]
    for steps in seen.values():
        for tokens, position, logits in steps:
            assert torch.equal(tokens, steps[0][0])
            assert tokens[0, 0] == first
            assert position[0, 0] == len(TEXT)
            torch.testing.assert_close(logits, steps[0][2])
            torch.testing.assert_close(logits[0, 0], second)
    assert costs.length == len(TEXT)
    assert min(costs.plain, *costs.of(CHAIN), *costs.of(WIDE)) > 0.0


def test_a_text_as_long_as_the_context_leaves_room_for_a_tree(tiny_target: Target) -> None:
    heads = random_heads(tiny_target.model)
    limit = tiny_target.runner.context_length
    make = lambda shape: medusa(tiny_target.runner, heads, shape)  # noqa: E731
    costs = measure_costs(tiny_target, cast(Any, make), [CHAIN], [3] * limit, Greedy())
    assert costs.length == limit - CHAIN.depth - 2
