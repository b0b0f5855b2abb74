"""What steps cost: the sizes that are measured, what lies between them, and a bench on which every step is the same."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from eval import tree_costs
from eval.decoding.drafters.heads import HeadsDrafter
from eval.decoding.static_tree import TreeShape
from eval.target import Target
from eval.tree_costs import Costs, between, measure_costs, rising, sizes_to_measure
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
        tiny_target, lambda shape: cast(HeadsDrafter, medusa(runner, heads, shape)), shapes, TEXT
    )
    assert {nodes: len(steps) for nodes, steps in seen.items()} == dict.fromkeys((1, 4, 11), 27)
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
    make = lambda shape: cast(HeadsDrafter, medusa(tiny_target.runner, heads, shape))  # noqa: E731
    assert measure_costs(tiny_target, make, [CHAIN], [3] * limit).length == limit - CHAIN.depth - 2
