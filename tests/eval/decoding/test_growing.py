"""Expand and rerank, beside a twin made of Python's tuples and dicts."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.decoding.growing import Growing, Kept, Plan, likeliest

Path = tuple[int, ...]
VALUES = [0.0, -0.25, -0.5, -1.0, -4.0, float("-inf")]
"""Logarithms of probabilities: few, so that there are ties, and exact in every order of adding."""
ROOT = 99


def children(seed: int, path: Path, width: int) -> list[tuple[int, float]]:
    """What is drafted after a path: tokens and logarithms of probabilities, likeliest first."""
    dice = random.Random(f"{seed} {path}")
    values = sorted((dice.choice(VALUES) for _ in range(width)), reverse=True)
    return list(zip(dice.sample(range(50), width), values, strict=True))


class Twin:
    """What is expanded and what is kept, level by level."""

    def __init__(self, seed: int, depth: int, width: int, count: int) -> None:
        score: dict[Path, float] = {(): 0.0}
        self.expanded: list[Path] = [()]
        frontier: list[Path] = [()]
        for _ in range(depth):
            level = []
            for path in frontier:
                for token, value in children(seed, path, width):
                    score[(*path, token)] = score[path] + value
                    level.append((*path, token))
            frontier = sorted(level, key=score.__getitem__, reverse=True)[:width]  # stable
            self.expanded += frontier
        self.expanded = self.expanded[: 1 + (depth - 1) * width]  # the last level is not expanded
        proposed = [path for path in score if path]
        self.kept = sorted(proposed, key=score.__getitem__, reverse=True)[:count]
        self.possible = [score[path] > float("-inf") for path in self.kept]


def path_of(growing: Growing, row: int, node: int) -> Path:
    """The tokens from the root, which is left out, to a node that was run."""
    tokens = []
    while node > 0:
        tokens.append(int(growing.tokens[row, node]))
        node = int(growing.parents[row, node])
    return tuple(reversed(tokens))


def grow(plan: Plan, seeds: list[int]) -> tuple[Growing, Kept]:
    growing = Growing(plan, torch.full((len(seeds), 1), ROOT))
    for _ in range(plan.depth):
        drafted = [
            [
                children(seed, path_of(growing, row, node), plan.width)
                for node in range(growing.first, growing.stop)
            ]
            for row, seed in enumerate(seeds)
        ]
        both = torch.tensor(drafted)  # [batch, nodes, width, 2]
        growing.expand(both[..., 1], both[..., 0].long())
    return growing, growing.keep()


def plan_of(depth: int, width: int, count: int) -> Plan:
    proposed = width + (depth - 1) * width**2
    return Plan(depth, width, min(count, proposed), torch.device("cpu"))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.lists(st.integers(), min_size=1, max_size=3)
)
def test_the_twin_expands_and_keeps_the_same(depth: int, width: int, count: int, seeds: list[int]) -> None:
    plan = plan_of(depth, width, count)
    growing, kept = grow(plan, seeds)
    for row, seed in enumerate(seeds):
        twin = Twin(seed, depth, width, plan.count)
        run = kept.run[row].tolist()
        assert [path_of(growing, row, node) for node in range(plan.expanded)] == twin.expanded
        assert [path_of(growing, row, node) for node in run] == [(), *twin.kept]
        assert kept.possible[row].tolist() == [True, *twin.possible]
        assert growing.level[row, run].tolist() == [0, *map(len, twin.kept)]
        check_tree(kept.parents[row].tolist(), [(), *twin.kept])
        check_places(growing, row, run, twin)


def check_tree(parents: list[int], paths: list[Path]) -> None:
    """Closed under parents, which come before their children."""
    assert parents[0] == -1
    for node, path in enumerate(paths[1:], 1):
        assert parents[node] < node
        assert paths[parents[node]] == path[:-1]


def check_places(growing: Growing, row: int, run: list[int], twin: Twin) -> None:
    """Each node has one place, what was expanded the one where it was; and everyone sees their ancestors."""
    plan = growing.plan
    assert len(set(run)) == len(run)
    assert max(run) < plan.span
    fresh = [place for place in run if place >= plan.expanded]
    assert fresh == [plan.expanded + index for index in range(len(fresh))]
    unexpanded = set(twin.kept) - set(twin.expanded)
    assert len(unexpanded) == len(fresh) <= plan.fresh
    for node in range(plan.span):
        seen = growing.visible[row, node].nonzero().flatten().tolist()
        path = path_of(growing, row, node)
        is_padding = node >= plan.expanded and node not in run
        assert int(growing.tokens[row, node]) == (ROOT if node == 0 else 0 if is_padding else path[-1])
        ancestors = {path[:length] for length in range(len(path))}
        assert seen[-1] == node
        assert {path_of(growing, row, other) for other in seen[:-1]} == ({()} if is_padding else ancestors)
        assert len(seen) - 1 == (1 if is_padding else len(path))


def test_all_that_is_fresh_can_be() -> None:
    """The room for kept nodes that were not expanded is not larger than needed: some trees fill it."""
    for depth, width, count in ((1, 3, 3), (3, 2, 4), (4, 2, 5), (2, 3, 4)):
        plan = plan_of(depth, width, count)
        most = 0
        for seed in range(300):
            twin = Twin(seed, depth, width, plan.count)
            most = max(most, len(set(twin.kept) - set(twin.expanded)))
        assert most == plan.fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_likeliest(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0, 0, 3:] = -torch.inf
    values, tokens = likeliest(logits, 4)
    expected = logits.double().log_softmax(-1).sort(dim=-1, descending=True)
    torch.testing.assert_close(values.double(), expected.values[..., :4], rtol=0, atol=1e-5)
    assert (values[0, 0, 3:] == -torch.inf).all()
    assert values.max() <= 0
    assert torch.equal(tokens[1], expected.indices[1, :, :4])


def test_logits_that_are_no_numbers_break_no_tree() -> None:
    """The rule tells the user; until then every index has to be one."""
    plan = plan_of(4, 2, 6)
    growing = Growing(plan, torch.zeros((1, 1), dtype=torch.long))
    for level in range(plan.depth):
        logits = torch.randn(1, growing.stop - growing.first, 5)
        logits[:, -1] = torch.nan if level % 2 else -torch.inf
        growing.expand(*likeliest(logits, plan.width))
    kept = growing.keep()
    check_tree(kept.parents[0].tolist(), [path_of(growing, 0, node) for node in kept.run[0].tolist()])
