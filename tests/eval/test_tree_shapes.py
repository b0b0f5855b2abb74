"""The best trees by the ranks of what follows: nothing better by brute force, and decoding's own arithmetic."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from eval.decoding.static_tree import RanksPath
from eval.tree_ranks import MISSING, TOP
from eval.tree_shapes import Frequencies, accepted_drafts, decoded

LEVELS = 3


def drawn_ranks(places: int, seed: int) -> Tensor:
    """Ranks of which some hang together: a second rank is often the first one again, which products do not see."""
    draw = random.Random(seed)
    rows = []
    for _ in range(places):
        row = [draw.choice([0, 0, 0, 1, 1, 2, TOP])]
        while len(row) < LEVELS:
            row.append(row[-1] if draw.random() < 0.6 else draw.choice([0, 1, 2, TOP]))
        rows.append(row)
    return torch.tensor(rows)


def naive_accepted(place: Sequence[int], paths: Sequence[RanksPath]) -> int:
    """The longest path of the tree that the ranks at a place begin with."""
    return max([len(path) for path in paths if tuple(place[: len(path)]) == path], default=0)


def every_tree(size: int, depth: int) -> Iterator[tuple[RanksPath, ...]]:
    """All trees of ranks 0..2 with so many nodes."""
    every = [path for level in range(1, depth + 1) for path in itertools.product(range(LEVELS), repeat=level)]
    for paths in itertools.combinations(every, size):
        if all(len(path) == 1 or path[:-1] in paths for path in paths):
            yield paths


@pytest.mark.parametrize(("size", "depth"), [(1, 3), (2, 3), (3, 2), (4, 2), (4, 3)])
def test_no_tree_accepts_more(size: int, depth: int) -> None:
    ranks = drawn_ranks(60, seed=size)
    best = Frequencies(ranks, prior=0.0).best(size, depth)
    assert len(best) == size
    wins = [sum(naive_accepted(place, best) for place in ranks.tolist())]
    wins += [sum(naive_accepted(p, paths) for p in ranks.tolist()) for paths in every_tree(size, depth)]
    assert wins[0] == max(wins[1:])
    assert wins[0] > min(wins[1:])


def test_parents_come_before_children_in_order_of_merit() -> None:
    ranks = drawn_ranks(200, seed=0)
    for prior in (0.0, 5.0):
        best = Frequencies(ranks, prior).best(30, LEVELS)
        assert len(best) == len(set(best)) == 30
        for place, path in enumerate(best):
            assert len(path) == 1 or path[:-1] in best[:place]
        assert Frequencies(ranks, prior).best(7, LEVELS) == best[:7]  # to cut is to drop the least useful
    assert all(len(path) == 1 for path in Frequencies(ranks).best(30, 1))


def test_without_a_prior_chances_are_shares_and_with_an_endless_one_products() -> None:
    ranks = drawn_ranks(300, seed=1)
    places = ranks.tolist()
    joint, product = Frequencies(ranks, prior=0.0), Frequencies(ranks, prior=1e12)
    for path in [(), (0,), (1, 1), (2, 0)]:
        after = [place for place in places if tuple(place[: len(path)]) == path]
        for rank in range(LEVELS):
            share = sum(place[len(path)] == rank for place in after) / len(after)
            accuracy = sum(place[len(path)] == rank for place in places) / len(places)
            assert joint.children(path)[rank] == pytest.approx(share)
            assert product.children(path)[rank] == pytest.approx(accuracy)
            assert not path or abs(share - accuracy) > 1e-6
    assert joint.children((2, 2))[9] == 0.0


def test_places_near_the_end_are_not_counted_and_what_was_never_right_is_no_node() -> None:
    ranks = torch.tensor([[0, 0], [0, TOP], [1, MISSING], [MISSING, MISSING]])
    found = Frequencies(ranks, prior=0.0)
    assert found.best(9, 2) == [(0,), (0, 0)]
    assert found.children(()) == [1.0] + [0.0] * (TOP - 1)
    nothing = Frequencies(torch.full((3, 2), MISSING))
    assert nothing.best(9, 2) == []


def test_accepted_drafts_are_those_of_every_cut_of_the_tree() -> None:
    ranks = drawn_ranks(50, seed=2)
    ranks[-1, 1:] = MISSING
    paths = Frequencies(ranks[:20]).best(12, LEVELS)
    needed = accepted_drafts(ranks, paths)
    for size in range(13):
        expected = [naive_accepted(place, paths[:size]) for place in ranks.tolist()]
        assert (needed <= size).sum(dim=1).tolist() == expected
    assert max(expected) > 1


@pytest.mark.parametrize(
    ("drafts", "tokens", "steps"),
    [
        ([0, 0, 0, 0], 3, 3),
        ([1, 9, 0, 0], 3, 2),  # the second step begins after the first one's own token
        ([9, 9, 9, 9], 3, 1),  # no more than the text has
        ([2, 0, 0, 1], 3, 1),
        ([0], 0, 0),  # the prefill gave all of it
    ],
)
def test_steps_of_a_decode(drafts: list[int], tokens: int, steps: int) -> None:
    assert decoded(drafts) == (tokens, steps)
