"""The tree that gives the most tokens per second with given heads, on this machine: `python -m eval tree`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from eval.decoding.drafters.heads import HeadsDrafter
from eval.decoding.static_tree import RanksPath, TreeShape
from eval.decoding.strategies import STRATEGIES, make_drafter
from eval.draft_heads import CHAIN, drafting_strategy
from eval.drafts import with_loaded_drafts
from eval.prompts import dataset_path, encode_prompts, evenly_spaced
from eval.target import Target
from eval.tree_costs import Costs, measure_costs, sizes_to_measure
from eval.tree_ranks import Accuracy, Text, accuracies, continued, text_ranks
from eval.tree_shapes import Frequencies, accepted_drafts, decoded
from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_prompts

MOST_NODES = 511


@dataclass(frozen=True)
class Request:
    """Which texts trees are judged by, and how large they may be. Raises UserError for impossible ones."""

    dataset: str = "heldout"
    num_samples: int | None = None
    max_steps: int = 128
    max_nodes: int = 63

    def __post_init__(self) -> None:
        if not 1 <= self.max_nodes <= MOST_NODES:
            raise UserError(f"--max_nodes {self.max_nodes}: give 1 to {MOST_NODES}")
        if self.num_samples is not None and self.num_samples < 2:
            raise UserError(
                f"--num_samples {self.num_samples}: give 2 or more; a tree made from one half is judged by the other"
            )
        if self.max_steps < 2:
            raise UserError(
                f"--max_steps {self.max_steps}: give 2 or more; drafts follow the first new token"
            )


@dataclass(frozen=True)
class Candidate:
    """A tree and what is expected of it.

    Attributes:
        length: acceptance length, on texts that took no part in choosing the nodes.
        draft, verify: seconds of a step.
        speedup: tokens per second over plain decoding's.
    """

    shape: TreeShape
    length: float
    draft: float
    verify: float
    speedup: float


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        strategy, draft: what drafts, and how its heads are called.
        best: of all candidates.
        shown: some of them by their nodes: the chains, the best of each size that was measured, and `best`.
        texts: how many they were judged by.
    """

    strategy: str
    draft: str
    best: Candidate
    shown: list[Candidate]
    accuracies: list[Accuracy]
    costs: Costs
    texts: int


def draft_name(target: Target, draft: str | None) -> str:
    """The heads that are meant: those of that name, else those of the target's run. Raises UserError."""
    if draft is not None:
        return draft
    heads = None if target.run is None else target.run.heads
    if heads is None:
        raise UserError(
            f"'{target.name}' comes with no heads; name some by --draft DIR, or the --run that trained them"
        )
    return str(heads)


def search_tree(target: Target, draft: str, request: Request) -> Search:
    """Look for the best tree for the heads of that name. Raises UserError."""
    # 1. Everything that can be refused is refused now.
    strategy = drafting_strategy(draft)
    kind = STRATEGIES[strategy]
    if not issubclass(kind, HeadsDrafter):
        raise UserError(
            f"--draft '{draft}' has no heads that draft trees; name a directory of Medusa or Hydra heads"
        )
    heads = with_loaded_drafts(target, strategy, {"draft": draft, "tree": CHAIN})["draft"]

    def make(shape: TreeShape) -> HeadsDrafter:
        return cast(HeadsDrafter, make_drafter(strategy, target.runner, draft=heads, tree=shape))

    chain = make(TreeShape.chain(heads.number))
    rows = read_prompts(dataset_path(target, request.dataset))
    prompts = encode_prompts(target, evenly_spaced(rows, request.num_samples))

    # 2. What the target says itself, and where in it the heads are right.
    texts = continued(target, prompts, request.max_steps)
    if len(texts) < 2:
        raise UserError(f"{request.dataset}: only one prompt can be continued; give 2 or more")
    ranks = [text_ranks(chain, text) for text in texts]
    shapes = Shapes([one[:, 1:] for one in ranks], request.max_nodes)

    # 3. What steps cost.
    costs = measure_costs(target, make, list(shapes.to_measure()), middle_of(texts))

    # 4. Tokens per second of every tree.
    candidates = [valued(shape, shapes.length(shape), costs) for shape in shapes.all()]
    best = max(candidates, key=lambda one: one.speedup)
    return Search(
        strategy,
        draft,
        best,
        shown(candidates, best, request.max_nodes),
        accuracies(ranks),
        costs,
        len(texts),
    )


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

    def all(self) -> Iterator[TreeShape]:
        """Every tree once."""
        yield from map(TreeShape.chain, self.depths)
        for depth in self.depths:
            for size in range(1, self._most + 1):
                shape = self._tree(depth, size)
                if shape is not None:
                    yield shape

    def to_measure(self) -> Iterator[TreeShape]:
        """Those whose steps are timed: the chains, and of trees sizes here and there."""
        sizes = set(sizes_to_measure(self._most))
        return (shape for shape in self.all() if shape.is_chain or shape.size in sizes)

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


def middle_of(texts: Sequence[Text]) -> list[int]:
    """A text as long as decoding them finds in the cache: one of them up to the middle of its continuation."""
    middles = sorted((text.tokens[: (text.given + len(text.tokens)) // 2] for text in texts), key=len)
    return middles[len(middles) // 2]


def valued(shape: TreeShape, length: float, costs: Costs) -> Candidate:
    """The tree with the tokens per second that its acceptance length and its costs promise, over plain decoding's."""
    draft, verify = costs.of(shape)
    return Candidate(shape, length, draft, verify, length * costs.plain / (draft + verify))


def shown(candidates: Sequence[Candidate], best: Candidate, most: int) -> list[Candidate]:
    """See `Search.shown`."""
    found = [one for one in candidates if one.shape.is_chain or one is best]
    for size in sizes_to_measure(most):
        trees = [one for one in candidates if one.shape.size == size and not one.shape.is_chain]
        if trees and best.shape.size != size:
            found.append(max(trees, key=lambda one: one.speedup))
    return sorted(found, key=lambda one: (one.shape.size, one.shape.depth))
