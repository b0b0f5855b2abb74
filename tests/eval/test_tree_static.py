"""The static trees that are looked at, and what they are expected to win."""

from __future__ import annotations

import torch

from eval.decoding.static_tree import TreeShape
from eval.tree_costs import sizes_to_measure
from eval.tree_static import Shapes


def shares(*rows: list[int], times: int = 3) -> list[torch.Tensor]:
    """Texts with these ranks at every place."""
    return [torch.tensor([row] * times) for row in rows]


def test_a_trees_length_is_measured_on_texts_that_it_was_not_made_from() -> None:
    """One half of the texts goes on by rank 1, the other by rank 2: what one half teaches is wrong for the other."""
    ranks = shares([1, 0], [2, 0], [1, 0], [2, 0], times=9)
    shapes = Shapes(ranks, 6)
    two = {shape.size: shape for shape in shapes.trees(1)}[2]
    assert set(two.paths) == {(1,), (2,)}  # all texts together know both
    assert shapes.length(two) == 1.0
    alike = Shapes(shares([1, 0], [1, 0], times=9), 6)
    (one,) = (shape for shape in alike.trees(1) if shape.size == 1)
    assert one.paths == ((1,),)
    assert alike.length(one) == 2.0  # 8 tokens after the first one in 4 steps
    assert alike.length(TreeShape.chain(1)) == 1.0


def test_every_static_tree_is_looked_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = list(torch.randint(4, (4, 40, 3, 2), generator=generator).amin(dim=-1))
    shapes = Shapes(ranks, 20)
    assert [shape.size for shape in shapes.chains() if shape.is_chain] == [1, 2, 3]
    found = [shape for depth in shapes.depths for shape in shapes.trees(depth)]
    assert len({shape.paths for shape in found + shapes.chains()}) == len(found) + 3
    sizes = {depth: [shape.size for shape in shapes.trees(depth)] for depth in shapes.depths}
    assert sizes[1][-1] == 4  # there are no more ranks
    assert sizes[2] == list(range(sizes[2][0], 21))
    assert sizes[3] == list(range(sizes[3][0], 21))
    measured = {depth: [shape.size for shape in shapes.to_measure(depth)] for depth in shapes.depths}
    for depth, chosen in measured.items():
        known = [size for size in sizes_to_measure(20) if size in sizes[depth]]
        assert set(chosen) <= set(known)
        assert (chosen[0], chosen[-1]) == (known[0], known[-1])
