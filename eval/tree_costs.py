"""What a decoding step costs with trees of several sizes, measured by the loop's own functions."""

from __future__ import annotations

import statistics
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from eval.clock import now
from eval.decoding.acceptance import Rule
from eval.decoding.drafters.base import Drafter, State
from eval.decoding.drafters.heads import HeadsDrafter
from eval.decoding.growing import Shape
from eval.decoding.speculate import keep, prefill, verify
from eval.decoding.static_tree import TreeShape
from eval.decoding.strategies import make_drafter
from eval.strategy_spec import BASELINE
from eval.target import Target
from eval.tree_ranks import with_bar

REPEATS = 13
WARM_UPS = 2

AnyShape = TreeShape | Shape
Curve = dict[int, float]
"""nodes, or levels -> seconds"""


@dataclass
class Costs:
    """Seconds of a step. Nodes are counted without the root, so verifying n of them runs n + 1 rows.

    Attributes:
        plain: of plain decoding.
        chain_verify, chain_draft: of chains, by their length.
        tree_verify: of other trees, by their nodes.
        tree_draft: of other trees: of static ones by their depth and their nodes, of dynamic ones by their width and
            their depth, since they propose the same however many nodes are kept.
        length: tokens in the cache meanwhile.
    """

    plain: float = 0.0
    chain_verify: Curve = field(default_factory=dict)
    chain_draft: Curve = field(default_factory=dict)
    tree_verify: Curve = field(default_factory=dict)
    tree_draft: dict[int, Curve] = field(default_factory=dict)
    length: int = 0

    def of(self, shape: AnyShape) -> tuple[float, float]:
        """Seconds to draft a tree and to verify it, between the sizes that were measured by a straight line."""
        if shape.is_chain:
            return self.chain_draft[shape.size], self.chain_verify[shape.size]
        curve, at = drafting_place(shape)
        return between(self.tree_draft[curve], at), between(self.tree_verify, shape.size)

    def at_least(self, depth: int) -> float:
        """Seconds that no tree of that depth can do without: those of the chain, as far as chains were measured."""
        chain = min(depth, max(self.chain_draft))
        return self.chain_draft[chain] + self.chain_verify[chain]

    def with_trees(self, trees: Costs) -> Costs:
        """The same with what was measured of trees at another time, in the same plain steps."""
        pace = self.plain / trees.plain
        verify = {size: pace * seconds for size, seconds in trees.tree_verify.items()}
        draft = {
            curve: {at: pace * seconds for at, seconds in values.items()}
            for curve, values in trees.tree_draft.items()
        }
        return replace(
            self, tree_verify=rising(self.tree_verify | verify), tree_draft=self.tree_draft | draft
        )


def drafting_place(shape: AnyShape) -> tuple[int, int]:
    """The curve of `Costs.tree_draft` that a tree belongs to, and its place there."""
    return (shape.depth, shape.size) if isinstance(shape, TreeShape) else (shape.width, shape.depth)


def between(curve: Curve, at: int) -> float:
    """A value of a curve by the straight line between the measured points beside it; the nearest one's outside."""
    points = sorted(curve)
    place = bisect(points, at)
    if place in (0, len(points)):
        return curve[points[min(place, len(points) - 1)]]
    low, high = points[place - 1], points[place]
    return curve[low] + (curve[high] - curve[low]) * (at - low) / (high - low)


def rising(curve: Curve) -> Curve:
    """The nearest curve that never falls: more rows cost no less, and what says so was a slow moment.

    Neighbours in the wrong order get their mean (the pool adjacent violators algorithm).
    """
    pools: list[tuple[float, list[int]]] = []
    for nodes in sorted(curve):
        value, members = curve[nodes], [nodes]
        while pools and pools[-1][0] > value:
            lower, before = pools.pop()
            value = (lower * len(before) + value * len(members)) / (len(before) + len(members))
            members = before + members
        pools.append((value, members))
    return {nodes: value for value, members in pools for nodes in members}


def sizes_to_measure(most: int) -> list[int]:
    """Numbers of nodes with which 1, 2, 3, 4, 6, 8, 12, 16, 24, ... rows are verified, up to `most` and that one."""
    rows = sorted({factor << power for factor in (2, 3) for power in range(most.bit_length())})
    return sorted({nodes for row in rows if 0 < (nodes := row - 1) <= most} | {most})


def measure_costs(
    target: Target,
    make: Callable[[AnyShape], Drafter],
    shapes: Sequence[AnyShape],
    text: list[int],
    rule: Rule,
) -> Costs:
    """Time steps that draft these trees after `text`, and plain ones, in turn; see `usual`.

    A step goes as in `eval.decoding.speculate`: propose, verify, accept, keep and advance, a draft or none accepted.
    """
    depth = max(shape.depth for shape in shapes)
    text = text[: max(1, target.runner.context_length - depth - 2)]
    drafters: list[Drafter] = [make_drafter(BASELINE, target.runner), *map(make, shapes)]
    seconds: list[list[tuple[float, float]]] = [[] for _ in drafters]
    bench = _Bench(target, drafters, text, depth, rule)
    rounds = range(-WARM_UPS, REPEATS)
    for turn in with_bar(rounds, "measuring steps"):
        for index in range(len(drafters)):
            which = (index + turn) % len(drafters)
            taken = bench.step(drafters[which])
            if turn >= 0:
                seconds[which].append(taken)
    costs = Costs(plain=usual([sum(one) for one in seconds[0]]), length=len(text))
    verify_seconds: dict[int, list[float]] = {}
    for shape, found in zip(shapes, seconds[1:], strict=True):
        drafting, verifying = usual([draft for draft, _ in found]), [rest for _, rest in found]
        if shape.is_chain:
            costs.chain_draft[shape.size] = drafting
            costs.chain_verify[shape.size] = usual(verifying)
        else:
            curve, at = drafting_place(shape)
            costs.tree_draft.setdefault(curve, {})[at] = drafting
            verify_seconds.setdefault(shape.size, []).extend(verifying)
    costs.tree_verify = rising({size: usual(values) for size, values in verify_seconds.items()})
    costs.tree_draft = {curve: rising(values) for curve, values in costs.tree_draft.items()}
    return costs


def usual(seconds: Sequence[float]) -> float:
    """The lower quartile: what disturbs a step makes it longer, and on a busy machine may disturb most of them."""
    return statistics.quantiles(seconds, n=4)[0]


class _Bench:
    """A decode that stands still: the same text in the cache before every step."""

    def __init__(
        self, target: Target, drafters: Sequence[Drafter], text: list[int], depth: int, rule: Rule
    ) -> None:
        runner = target.runner
        self.device = runner.device
        self.text = text
        self.rule = rule
        most = max(drafter.max_nodes for drafter in drafters)
        self.state = State(runner, [text], len(text) + depth + 2, most, self.rule)
        self.rule.begin(self.state)
        reader = max(drafters, key=lambda drafter: len(drafter.needs))
        with torch.inference_mode():
            logits, self.states = prefill(self.state, reader, [text])
            first = int(logits.argmax())
        self.state.cache.lengths = [len(text)]
        self.state.texts[0].append(first)
        self.state.begin_step([first], [depth + 2], [False])

    @torch.inference_mode()
    def step(self, drafter: Drafter) -> tuple[float, float]:
        """Seconds of drafting and of the rest."""
        state = self.state
        drafter.start(state, [self.text], self.states)
        times = [now(self.device)]
        draft = drafter.propose(state)
        times.append(now(self.device))
        logits, states = verify(state, drafter, draft)
        outcome = self.rule.accept(state, logits, draft)
        outcome.states.update(states)
        outcome.path[0] = likely_path(drafter, draft.num_nodes)
        outcome.tokens[0] = [0] * len(outcome.path[0])  # whatever they are, they cost the same
        keep(state, outcome)
        times.append(now(self.device))
        drafter.advance(outcome)
        times.append(now(self.device))
        state.cache.lengths = [len(self.text)]
        return times[1] - times[0] + times[3] - times[2], times[2] - times[1]


def likely_path(drafter: Drafter, nodes: int) -> list[int]:
    """The root and a child of it: in a static tree the last one, which has children and has to be moved in the cache.

    Node 1 of a dynamic tree is the likeliest child of the root.
    """
    if nodes == 1:
        return [0]
    return [0, drafter.layout.sizes[1]] if isinstance(drafter, HeadsDrafter) else [0, 1]
