"""Dynamic trees and chains of every size from one look at the texts, against decoding with each of them."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from eval.decoding.acceptance import Greedy, Rule
from eval.decoding.growing import Shape
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.tree import Draft
from eval.target import Target
from eval.tree_growth import LEVELS, futures, growth_length, needed_nodes, to_measure, trees_of, watch
from eval.tree_ranks import Text
from eval.tree_shapes import NEVER, decoded
from tests.eval.decoding.eagle_heads import NEW, Fitted, drafting
from tests.eval.decoding.test_self_tree import run
from tests.eval.decoding.test_speculate import PROMPTS

FITTED = Fitted("llama")
TARGET = Target("tiny", FITTED.model, cast("object", None), FITTED.runner)  # type: ignore[arg-type]
SHAPES = {
    1: [Shape(1, 1, 1), Shape(3, 1, 3), Shape(LEVELS, 1, LEVELS)],
    2: [Shape(1, 2, 2), Shape(2, 2, 3), Shape(4, 2, 7), Shape(LEVELS, 2, 15)],
    3: [Shape(2, 3, 3), Shape(3, 3, 11), Shape(5, 3, 7)],
}


def drawing() -> Rule:
    """A rule that draws tokens, the same ones whenever it is made."""
    return Sampling(Shaping({"temperature": 0.4}, [], FITTED.runner.vocab_size), 5)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("width", SHAPES)
@pytest.mark.parametrize("strategy", ["eagle2", "eagle3"])
def test_what_a_look_foretells_is_what_decoding_wins(
    monkeypatch: pytest.MonkeyPatch, strategy: str, width: int, sampled: bool
) -> None:
    """Of every tree of a width, from rows of different lengths in batches of two."""
    monkeypatch.setattr("eval.tree_growth.TOGETHER", 2)
    monkeypatch.setattr(Target, "eos_token_ids", [])
    draft, rule = FITTED.drafts[strategy], drawing() if sampled else Greedy()
    make = lambda shape: drafting(strategy, FITTED.runner, draft, shape)  # noqa: E731
    plain = run(FITTED.runner, None, PROMPTS, rule=rule)
    texts = [
        Text(prompt + row.tokens, len(prompt), stream)
        for stream, (prompt, row) in enumerate(zip(PROMPTS, plain, strict=True))
    ]
    needed = watch(TARGET, make, width, texts, rule)
    assert [one.shape for one in needed] == [(NEW, LEVELS, LEVELS)] * len(texts)
    lengths = set()
    for shape in SHAPES[width]:
        rows = run(FITTED.runner, make(shape), PROMPTS, rule=rule)
        for one, row, text in zip(needed, rows, texts, strict=True):
            assert row.tokens == text.new
            foretold = decoded((one[:, shape.depth - 1] <= shape.size).sum(dim=1).tolist())
            assert foretold == (sum(row.accepted_lengths), len(row.accepted_lengths))
        won = [row.accepted_lengths for row in rows]
        assert growth_length(needed, shape) == pytest.approx(sum(map(sum, won)) / sum(map(len, won)))
        lengths.add(growth_length(needed, shape))
    assert max(lengths) > 1.05  # some drafts are right, and not all
    assert len(lengths) > 1 or sampled


def test_nodes_are_counted_among_those_of_as_many_levels() -> None:
    """Root 7; its children 8, 9; below 9, which comes first, 5 and below that 6; a node of padding."""
    tokens = torch.tensor([[7, 9, 5, 6, 8, 8]])
    parents = torch.tensor([[-1, 0, 1, 2, 0, 1]])
    draft = Draft(
        tokens=tokens,
        parents=parents,
        position=40 + torch.tensor([[0, 1, 2, 3, 1, 2]]),
        slot=40 + torch.arange(6)[None],
        valid=torch.tensor([[True, True, True, True, True, False]]),
        candidate=torch.ones(1, 6, dtype=torch.bool),
    )
    rows = {
        (9, 5, 6): [[1, NEVER, NEVER], [1, 2, NEVER], [1, 2, 3]],
        (8, 5, 6): [[2, NEVER, NEVER], [3, NEVER, NEVER], [4, NEVER, NEVER]],
        (9, 8, 6): [[1, NEVER, NEVER]] * 3,  # padding is never right
        (5, 9, 6): [[NEVER] * 3] * 3,
        (-1, -1, -1): [[NEVER] * 3] * 3,  # the text has ended
    }
    for future, expected in rows.items():
        found = needed_nodes(draft, futures([list(future)], 0))
        assert found.shape == (1, LEVELS, LEVELS)
        assert found[0, :3, :3].tolist() == expected
        assert found[0, :, 3:].eq(NEVER).all()
    assert torch.equal(found[0, 2], found[0, LEVELS - 1])


def test_futures_are_padded_where_a_text_ends() -> None:
    found = futures([[3, 4, 5], list(range(20))], 2)
    assert found.tolist() == [[5] + [-1] * (LEVELS - 1), list(range(2, 2 + LEVELS))]


@pytest.mark.parametrize("most", [1, 2, 5, 63])
def test_trees_are_those_that_can_be_asked_for(most: int) -> None:
    assert trees_of(1, most) == [[Shape(n, 1, n)] for n in range(1, min(most, LEVELS) + 1)]
    for width in (2, 4, 10):
        groups = trees_of(width, most)
        for shapes in groups:
            (depth,) = {shape.depth for shape in shapes}
            assert all(depth < shape.size <= min(most, shape.proposed) for shape in shapes)
        measured = to_measure(groups)
        assert [shape.depth for shape in measured] == [shapes[0].depth for shapes in groups]
        if most == 63:
            assert len({shape.size for shape in measured}) > 3
