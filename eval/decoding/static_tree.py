"""Trees whose shape is known before any token is: each node is a path of ranks among what the heads offer.

Medusa's trees (section 2.1.2 of arXiv 2401.10774): the path (c_1, ..., c_j) ends in a node at level j, whose token is
the c_j-th best, counted from 0, that the drafter has to follow the path before it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from eval.decoding.tree import ancestor_mask
from layerskip_model.errors import UserError

RanksPath = tuple[int, ...]


@dataclass(frozen=True)
class TreeShape:
    """The nodes of a tree beside its root, the most useful first: to cut it is to drop the last ones.

    Attributes:
        name: how the user calls it.
        paths: of ranks; a node's parent comes before it.
    """

    spoken: ClassVar[str] = "chain, the name of a published tree, or a tree's JSON file"

    name: str
    paths: tuple[RanksPath, ...]

    @classmethod
    def chain(cls, depth: int) -> Self:
        """The best of each head, one after another."""
        return cls("chain", tuple((0,) * level for level in range(1, depth + 1)))

    @property
    def size(self) -> int:
        """Nodes, the root not among them."""
        return len(self.paths)

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return max(map(len, self.paths))

    @property
    def width(self) -> int:
        """Ranks that are needed of any head: the largest one and 1."""
        return 1 + max(max(path) for path in self.paths)

    @property
    def is_chain(self) -> bool:
        """Whether no node has two children."""
        return self.depth == self.size

    def cut(self, *, depth: int | None = None, size: int | None = None) -> TreeShape:
        """The same without the levels below `depth`, and of what is left the first `size` nodes."""
        paths = [path for path in self.paths if depth is None or len(path) <= depth]
        return TreeShape(self.name, tuple(paths[:size]))


def checked_tree(name: str, paths: Any) -> TreeShape:
    """The tree of paths as a file has them, parents put first. Raises UserError for what is no tree of ranks."""
    if not isinstance(paths, Sequence) or not paths:
        raise UserError(f"tree '{name}': it has no paths; give a list such as [[0], [1], [0, 0]]")
    found: list[RanksPath] = []
    for path in paths:
        is_path = isinstance(path, Sequence) and not isinstance(path, str) and len(path) > 0
        if not is_path or not all(type(rank) is int and rank >= 0 for rank in path):
            raise UserError(
                f"tree '{name}': {path!r:.60} is no path; give ranks, whole numbers of 0 or more, such as [0, 2]"
            )
        found.append(tuple(path))
    found.sort(key=len)  # stable: among nodes of one level the order stays
    known: set[RanksPath] = {()}
    for path in found:
        if path in known:
            raise UserError(f"tree '{name}': the path {list(path)} is there twice; give it once")
        if path[:-1] not in known:
            raise UserError(f"tree '{name}': the path {list(path)} has no parent; add {list(path[:-1])}")
        known.add(path)
    order = {tuple(path): place for place, path in enumerate(paths)}
    ranked = _parents_first(sorted(found, key=order.__getitem__))
    return TreeShape(name, tuple(ranked))


def _parents_first(paths: list[RanksPath]) -> list[RanksPath]:
    """The same paths in their order, each one's missing ancestors moved before it."""
    placed: dict[RanksPath, None] = {}
    for path in paths:
        for level in range(1, len(path) + 1):
            placed.setdefault(path[:level])
    return list(placed)


def read_tree(path: str | Path, name: str | None = None) -> TreeShape:
    """The tree in a JSON file: {"paths": [[0], [1], [0, 0], ...]}, the most useful first. Raises UserError."""
    name = str(path) if name is None else name
    content = read_tree_file(path, name)
    return checked_tree(name, content.get("paths") if isinstance(content, dict) else content)


def read_tree_file(path: str | Path, name: str) -> Any:
    """What a JSON file about trees says. Raises UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"tree '{name}': the file cannot be read ({reason}); give a JSON file") from None


class Layout:
    """A tree's nodes in the order in which they are verified: level by level, those without children first.

    So the nodes of a level that have children are the last of all nodes down to that level. Node 0 is the root.

    Attributes:
        sizes: nodes of each level, [1, ...].
        inner: nodes of each level that have children; of the last one none.
        parents, level: [1, n].
        visible: who is an ancestor of whom, oneself included, [1, n, n].
        rank: of each node but the root, [n - 1].
        path_to_inner: level -> the nodes on the way from the root to each of its inner nodes, itself included,
            [inner, level + 1].
        inner_nodes: those of all levels, [m]; those of a level begin at `inner_first[level]` among them.
        inner_parents: of each of them, among them, [m]; the root's is 0.
    """

    def __init__(self, shape: TreeShape, device: torch.device) -> None:
        self.shape = shape
        has_children = {path[:-1] for path in shape.paths}
        levels: list[list[RanksPath]] = [[()]]
        for depth in range(1, shape.depth + 1):
            nodes = [path for path in shape.paths if len(path) == depth]
            levels.append(sorted(nodes, key=has_children.__contains__))  # stable
        self.sizes = [len(level) for level in levels]
        self.inner = [sum(path in has_children for path in level) for level in levels]
        order = [path for level in levels for path in level]
        number = {path: node for node, path in enumerate(order)}
        first_inner = [sum(self.sizes[: d + 1]) - self.inner[d] for d in range(len(levels))]
        parents = [-1] + [number[path[:-1]] for path in order[1:]]
        self.parents = torch.tensor([parents], device=device)
        self.level = torch.tensor([[len(path) for path in order]], device=device)
        self.visible = ancestor_mask(self.parents)
        self.rank = torch.tensor([path[-1] for path in order[1:]], device=device)
        # Where a node's token stands among the best `width` tokens after each inner node, and after each level.
        self._widths = [1 + max(path[-1] for path in level) for level in levels[1:]]
        self._after_inner = [
            torch.tensor(
                [(number[path[:-1]] - first_inner[depth]) * width + path[-1] for path in level], device=device
            )
            for depth, (width, level) in enumerate(zip(self._widths, levels[1:], strict=True))
        ]
        self._after_level = (self.level[0, 1:] - 1) * shape.width + self.rank
        ways = [
            [[number[path[:end]] for end in range(len(path) + 1)] for path in level if path in has_children]
            for level in levels[:-1]
        ]
        self.path_to_inner = [torch.tensor(way, device=device) for way in ways]
        inner = [number[path] for path in order if path in has_children]
        among = {node: place for place, node in enumerate(inner)}
        self.inner_nodes = torch.tensor(inner, device=device)
        self.inner_first = [sum(self.inner[:depth]) for depth in range(len(levels))]
        self.inner_parents = torch.tensor([0] + [among[parents[node]] for node in inner[1:]], device=device)

    @cached_property
    def depth(self) -> int:
        """Levels below the root."""
        return len(self.sizes) - 1

    def nodes(self, depth: int) -> int:
        """How many nodes there are down to that level, the root included."""
        return sum(self.sizes[: depth + 1])

    def children(self, level: int, preferences: Tensor) -> Tensor:
        """The tokens of the next level's nodes, by what is preferred after the inner nodes of `level`.

        preferences [batch, inner nodes, vocab] -> [batch, nodes of level + 1].
        """
        best = preferences.topk(self._widths[level], dim=-1).indices  # [batch, inner, width]
        return best.flatten(1)[:, self._after_inner[level]]

    def descendants(self, preferences: Tensor) -> Tensor:
        """The tokens of all nodes below the root, where what is preferred depends on nothing but the level.

        preferences [batch, depth, vocab], after each level from 0 on -> [batch, nodes(depth) - 1].
        """
        best = preferences.topk(self.shape.width, dim=-1).indices  # [batch, depth, width]
        return best.flatten(1)[:, self._after_level[: self.nodes(preferences.shape[1]) - 1]]
