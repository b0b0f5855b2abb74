"""Published trees: whole, sound, and those that were published."""

from __future__ import annotations

import pytest

from eval.decoding.published_trees import DEFAULT, PUBLISHED, published_tree
from eval.decoding.static_tree import checked_tree

LEVELS = {  # nodes of each level
    "medusa_mc_sim_7b_63": [10, 28, 23, 2],
    "medusa_vicuna_33b_stage1": [10, 34, 19],
    "eagle_mc_sim_7b_63": [4, 8, 8, 3, 2],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_trees_are_sound(name: str) -> None:
    tree = published_tree(name)
    assert checked_tree(name, tree.paths) == tree  # nothing twice, parents first
    assert tree.size == (25 if name.startswith("eagle") else 63)
    assert tree.depth == {"eagle_mc_sim_7b_63": 5, "medusa_vicuna_33b_stage1": 3}.get(name, 4)
    for path in tree.paths:  # a better choice is never left out for a worse one
        assert path[-1] < 10
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in tree.paths
    if name in LEVELS:
        depths = [len(path) for path in tree.paths]
        assert [depths.count(1 + level) for level in range(tree.depth)] == LEVELS[name]


def test_their_names_and_first_and_last_nodes() -> None:
    assert DEFAULT in PUBLISHED
    assert len(PUBLISHED) == len(set(PUBLISHED)) == 10
    tree = published_tree("medusa_mc_sim_7b_63")
    assert tree.paths[:5] == ((0,), (0, 0), (1,), (0, 1), (2,))
    assert tree.paths[-3:] == ((0, 0, 0, 1), (1, 6), (0, 7, 0))
    assert published_tree("eagle_mc_sim_7b_63").paths[-2:] == ((0, 0, 0, 0, 0), (0, 0, 0, 0, 1))
