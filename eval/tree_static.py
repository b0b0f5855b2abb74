"""Static trees: which nodes they should have, by the ranks at which the heads are right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eval.decoding.static_tree import RanksPath, TreeShape
from eval.tree_costs import sizes_to_measure
from eval.tree_shapes import Frequencies, accepted_drafts, decoded

STRIDE = 2  # of the sizes that are measured, one in so many for each depth


class Shapes:
    """The trees that are looked at: the chains, and for every depth the best trees of 1, 2, 3, ... nodes.

    A tree is made from all texts. What it will win is judged by every second text with the tree of its size and depth
    that is made from the other half of them, and the other way round.
    """

    def __init__(self, ranks: Sequence[Tensor], most: int) -> None:
        self.depths = range(1, ranks[0].shape[1] + 1)
        self._ranks = ranks
        self._most = most
        halves = ranks[::2], ranks[1::2]
        whole, *parts = (Frequencies(torch.cat(list(one))) for one in (ranks, *halves))
        self._best = {depth: whole.best(most, depth) for depth in self.depths}
        self._reached = {
            depth: [
                accepted_drafts(one, paths)
                for half, other in ((halves[0], parts[1]), (halves[1], parts[0]))
                for paths in [other.best(most, depth)]
                for one in half
            ]
            for depth in self.depths
        }

    def chains(self) -> list[TreeShape]:
        """Of first choices."""
        return list(map(TreeShape.chain, self.depths))

    def trees(self, depth: int) -> list[TreeShape]:
        """Every other tree of that depth."""
        found = (self._tree(depth, size) for size in range(1, self._most + 1))
        return [tree for tree in found if tree is not None]

    def to_measure(self, depth: int) -> list[TreeShape]:
        """The trees of that depth whose steps are timed: the smallest, the largest and some between.

        What verification takes depends on the size alone, so the depths share the sizes among them.
        """
        sizes = sizes_to_measure(self._most)
        found = [tree for tree in self.trees(depth) if tree.size in sizes]
        turn = {size for place, size in enumerate(sizes) if (place - depth) % STRIDE == 0}
        return [tree for tree in found if tree.size in turn or tree in (found[0], found[-1])]

    def length(self, shape: TreeShape) -> float:
        """The acceptance length that decoding the texts would have with a tree of that kind, size and depth."""
        if is_first_choices(shape):
            reached = [accepted_drafts(one, shape.paths) for one in self._ranks]
        else:
            reached = self._reached[shape.depth]
        counts = [decoded((one <= shape.size).sum(dim=1).tolist()) for one in reached]
        return sum(tokens for tokens, _ in counts) / max(1, sum(steps for _, steps in counts))

    def _tree(self, depth: int, size: int) -> TreeShape | None:
        """The best tree of that size, where that is so deep and not the chain of first choices."""
        paths: Sequence[RanksPath] = self._best[depth][:size]
        shape = TreeShape("best", tuple(paths))
        exists = len(paths) == size and shape.depth == depth and not is_first_choices(shape)
        return shape if exists else None


def is_first_choices(shape: TreeShape) -> bool:
    """Whether it is the chain of all heads' first choices."""
    return shape.paths == TreeShape.chain(shape.depth).paths
