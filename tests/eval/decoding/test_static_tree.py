"""Shapes of static trees: order, cutting, files, and the layout against a walk over the paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.decoding.static_tree import Layout, TreeShape, checked_tree, read_tree
from layerskip_model.errors import UserError

PATHS = [[0], [1], [0, 0], [2], [0, 1], [1, 0], [0, 0, 0], [2, 3]]


def test_a_cut_tree_keeps_its_first_nodes() -> None:
    tree = checked_tree("mine", PATHS)
    assert (tree.size, tree.depth, tree.width, tree.is_chain) == (8, 3, 4, False)
    assert tree.cut(size=3).paths == ((0,), (1,), (0, 0))
    assert tree.cut(depth=2, size=4).paths == ((0,), (1,), (0, 0), (2,))
    assert TreeShape.chain(3).paths == ((0,), (0, 0), (0, 0, 0))
    assert TreeShape.chain(3).is_chain


def test_ancestors_move_before_their_descendants() -> None:
    tree = checked_tree("mine", [[1, 0], [0], [1]])
    assert tree.paths == ((1,), (1, 0), (0,))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "it has no paths"),
        (None, "it has no paths"),
        ([[0], []], "[] is no path"),
        ([[0], "00"], "'00' is no path"),
        ([[0], [-1]], "[-1] is no path"),
        ([[0], [1.5]], "[1.5] is no path"),
        ([[0], [True]], "[True] is no path"),
        ([[0], [0]], "[0] is there twice"),
        ([[0], [1, 2]], "[1, 2] has no parent; add [1]"),
    ],
)
def test_impossible_trees_are_refused(paths: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"paths": paths}))
    with pytest.raises(UserError) as caught:
        read_tree(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_damaged_or_missing_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"paths": [[0')
    for name in ("half.json", "none.json"):
        with pytest.raises(UserError, match="cannot be read") as caught:
            read_tree(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_the_layout_is_the_walk_over_the_paths() -> None:
    tree = checked_tree("mine", PATHS)
    layout = Layout(tree, torch.device("cpu"))
    n = layout.nodes(tree.depth)
    parents = layout.parents[0].tolist()
    ranks = [None, *layout.rank.tolist()]

    def path_of(node: int) -> tuple[int, ...]:
        return () if node == 0 else (*path_of(parents[node]), ranks[node])

    found = [path_of(node) for node in range(n)]
    assert sorted(found) == sorted([(), *map(tuple, PATHS)])
    assert layout.level[0].tolist() == [len(path) for path in found]
    assert all(parent < node for node, parent in enumerate(parents))
    for one in range(n):
        for other in range(n):
            is_ancestor = found[one][: len(found[other])] == found[other]
            assert layout.visible[0, one, other].item() == is_ancestor
    inner = {path[:-1] for path in found if path}
    for level, ways in enumerate(layout.path_to_inner):
        here = [node for node in range(n) if len(found[node]) == level]
        last = [node for node in here if found[node] in inner]
        assert last == here[len(here) - layout.inner[level] :]
        assert [[found[node] for node in way] for way in ways.tolist()] == [
            [found[node][:depth] for depth in range(level + 1)] for node in last
        ]


def test_children_are_the_ranked_tokens_after_their_parents() -> None:
    tree = checked_tree("mine", PATHS)
    layout = Layout(tree, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for level in range(tree.depth):
        inner = layout.inner[level]
        logits = torch.randn(2, inner, 11, generator=generator)
        got = layout.children(level, logits)
        below, here = layout.nodes(level), layout.nodes(level) - inner
        assert got.shape == (2, layout.sizes[level + 1])
        for place in range(layout.sizes[level + 1]):
            node = below + place
            parent = int(layout.parents[0, node])
            rank = int(layout.rank[node - 1])
            expected = logits[:, parent - here].argsort(dim=-1, descending=True)[:, rank]
            assert torch.equal(got[:, place], expected)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_descendants_are_the_ranked_tokens_of_their_levels(depth: int) -> None:
    layout = Layout(checked_tree("mine", PATHS), torch.device("cpu"))
    logits = torch.randn(2, depth, 11, generator=torch.Generator().manual_seed(0))
    order = logits.argsort(dim=-1, descending=True)
    got = layout.descendants(logits)
    assert got.shape == (2, layout.nodes(depth) - 1)
    for node in range(1, layout.nodes(depth)):
        expected = order[:, int(layout.level[0, node]) - 1, int(layout.rank[node - 1])]
        assert torch.equal(got[:, node - 1], expected)
