"""Candidates for the tree that heads draft: what is foretold of each, and a race of the likeliest winners.

What a step costs is foretold from steps that stand still, and many candidates lie nearer to each other than such
figures are exact. So the best of each kind decode the same prompts in turn, and that decides.
"""

from __future__ import annotations

import statistics
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from eval.decoding.acceptance import Rule
from eval.decoding.drafters.base import Drafter
from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.strategy_spec import BASELINE
from eval.target import Target
from eval.tree_costs import AnyShape, Costs, sizes_to_measure
from eval.tree_ranks import Text, with_bar

LAPS = 7  # texts that are decoded by every finalist
LAP_TOKENS = 48
FINALISTS = 5
HOPELESS = 0.85  # of the best prediction: what is foretold to be slower does not race


@dataclass(frozen=True)
class Candidate:
    """A tree and what is expected of it.

    Attributes:
        length: acceptance length, on texts that took no part in choosing the nodes.
        draft, verify: seconds of a step that stands still.
        predicted: tokens per second over plain decoding's, by these.
        raced: the same by the seconds of steps in real decodes; None for what did not race.
    """

    shape: AnyShape
    length: float
    draft: float
    verify: float
    predicted: float
    raced: float | None = None


def valued(shape: AnyShape, length: float, costs: Costs) -> Candidate:
    """The tree with the tokens per second that its acceptance length and its costs promise, over plain decoding's."""
    draft, verify = costs.of(shape)
    return Candidate(shape, length, draft, verify, length * costs.plain / (draft + verify))


def race(
    target: Target,
    make: Callable[[AnyShape], Drafter],
    finalists: Sequence[Candidate],
    texts: Sequence[Text],
    rule: Rule,
) -> list[Candidate]:
    """The finalists with what they reach where each, and plain decoding, decodes the same prompts in turn.

    A finalist's step is counted in plain steps of the same lap, by the median of the laps; its length is the foretold
    one, which is of more texts.
    """
    drafters = [make_drafter(BASELINE, target.runner), *(make(one.shape) for one in finalists)]
    laps: list[list[float]] = [[] for _ in finalists]
    track = texts[:LAPS]
    for lap, text in enumerate(with_bar([track[0], *track], "racing")):
        steps = [0.0] * len(drafters)
        for index in range(len(drafters)):
            which = (index + lap) % len(drafters)
            (row,) = decode(
                target.runner,
                drafters[which],
                [text.prompt],
                max_new_tokens=min(len(text.new), LAP_TOKENS),
                eos_token_ids=target.eos_token_ids,
                rule=rule,
                streams=[text.stream],
            )
            steps[which] = row.decode_seconds / row.target_forwards
        if lap:  # the first one warms up
            for taken, seconds in zip(laps, steps[1:], strict=True):
                taken.append(seconds / steps[0])
    return [
        replace(one, raced=one.length / statistics.median(taken))
        for one, taken in zip(finalists, laps, strict=True)
    ]


def finalists(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """Who races: the best chain, the best tree, and of the others the best, each of a depth and a size of its own."""
    ranked = sorted(candidates, key=lambda one: -one.predicted)
    chains = [one for one in ranked if one.shape.is_chain]
    trees = [one for one in ranked if not one.shape.is_chain]
    sizes = sizes_to_measure(most)
    found: dict[tuple[bool, int, int], Candidate] = {}
    for one in [*chains[:1], *trees[:1], *ranked]:
        kind = one.shape.is_chain, one.shape.depth, bisect(sizes, one.shape.size)
        if len(found) < 2 or (len(found) < FINALISTS and one.predicted > HOPELESS * ranked[0].predicted):
            found.setdefault(kind, one)
    return list(found.values())


def shown(candidates: Sequence[Candidate], raced: Sequence[Candidate], most: int) -> list[Candidate]:
    """Some of the candidates by their nodes: those that raced, the chains, and the best tree of each measured size."""
    found = {one.shape: one for one in raced}
    for one in candidates:
        if one.shape.is_chain:
            found.setdefault(one.shape, one)
    for size in sizes_to_measure(most):
        trees = [one for one in candidates if one.shape.size == size and not one.shape.is_chain]
        if trees and all(one.shape.is_chain or one.shape.size != size for one in raced):
            best = max(trees, key=lambda one: one.predicted)
            found.setdefault(best.shape, best)
    return sorted(found.values(), key=lambda one: (one.shape.size, one.shape.depth))
