"""Growing a draft tree: expand the likeliest nodes level by level, then keep the best of all that were proposed.

Expansion and reranking of EAGLE-2 (section 4 of arXiv 2406.16858). Nothing here knows who drafts, and nothing waits for
the device: which nodes are kept is data, how many nodes run where is not.

A node's score is the logarithm of what the drafter gives to the path that leads to it. A child's is never above
its parent's, and of equals the one proposed earlier is taken: so whatever is kept, its parent is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """How a tree may grow: `depth` levels, `width` children of a node and nodes of a level that get any, `count` kept.

    With a width of 1 it is a chain of first choices.
    """

    depth: int
    width: int
    count: int

    @property
    def size(self) -> int:
        """Nodes that are verified, the root not among them."""
        return self.count

    @property
    def proposed(self) -> int:
        """Nodes that are proposed, from which those are kept."""
        return self.width + (self.depth - 1) * self.width**2

    @property
    def is_chain(self) -> bool:
        """Whether no node has two children."""
        return self.width == 1


@dataclass(frozen=True)
class Plan:
    """The shape of a tree that grows: what is known before any token is.

    Nodes are run in this order: the root, `width` nodes of each level but the last, then what is kept without having
    been expanded.

    Attributes:
        depth: levels below the root, 1 or more.
        width: children that are proposed for a node, and nodes of a level that are expanded.
        count: nodes that are kept beside the root, at most `proposed`.
        device: where the trees are.
    """

    depth: int
    width: int
    count: int
    device: torch.device

    @property
    def proposed(self) -> int:
        """Nodes that are proposed, the root not among them."""
        return self.expanded * self.width

    @property
    def expanded(self) -> int:
        """Nodes that are expanded, the root included."""
        return 1 + (self.depth - 1) * self.width

    @property
    def fresh(self) -> int:
        """At most so many kept nodes have not been expanded.

        One of the last level comes with its ancestors, all expanded; one of a level before comes with all that were
        expanded there, since they are better, and with a parent.
        """
        return max(0, self.count - min(self.depth - 1, self.width + 1))

    @property
    def span(self) -> int:
        """Nodes that are run in all: the slots that the making takes."""
        return self.expanded + self.fresh

    @cached_property
    def parent(self) -> Tensor:
        """Which of the run nodes each proposed one is a child of, [proposed]."""
        return torch.arange(self.expanded, device=self.device).repeat_interleave(self.width)

    @cached_property
    def level(self) -> Tensor:
        """How far below the root each proposed node is, [proposed]."""
        return (self.parent + self.width - 1) // self.width + 1

    @cached_property
    def order(self) -> Tensor:
        """0, 1, 2, ... [1, span]."""
        return torch.arange(self.span, device=self.device)[None]

    @cached_property
    def everything(self) -> Tensor:
        """True, [1, span]."""
        return torch.ones((1, self.span), dtype=torch.bool, device=self.device)

    @cached_property
    def itself(self) -> Tensor:
        """[span, span], True on the diagonal."""
        return torch.eye(self.span, dtype=torch.bool, device=self.device)

    @cached_property
    def run_level(self) -> Tensor:
        """How far below the root each expanded node is, and 0 for those run after them, [1, span]."""
        return torch.where(self.order < self.expanded, (self.order + self.width - 1) // self.width, 0)


@dataclass(frozen=True)
class Kept:
    """The tree that is left, root first, then by score: parents come before their children.

    Attributes:
        run: where each node is among those that were run, [batch, 1 + count].
        parents: [batch, 1 + count] among the kept; -1 for the root.
        possible: [batch, 1 + count], False for tokens to which the drafter gives no probability.
    """

    run: Tensor
    parents: Tensor
    possible: Tensor


class Growing:
    """One tree per row of the batch, growing from its root by a plan.

    Every node that is run has a place in these, in the order of running:

    Attributes:
        tokens: [batch, span].
        parents: [batch, span]; -1 for the root and for padding.
        level: how far below the root, [batch, span]; 0 for padding.
        visible: who is an ancestor of whom, oneself included, [batch, span, span].
        first, stop: the nodes to be run and expanded next are first..stop-1.
        below: which of the nodes expanded last is the parent of each of those, [batch, stop - first].
    """

    def __init__(self, plan: Plan, root: Tensor) -> None:
        """Begin with the roots' tokens [batch, 1]."""
        batch, span = root.shape[0], plan.span
        self.plan = plan
        self.tokens = root.new_zeros((batch, span))
        self.tokens[:, :1] = root
        self.parents = root.new_full((batch, span), -1)
        self.level = plan.run_level.expand(batch, -1)
        self.visible = plan.itself.repeat(batch, 1, 1)
        self.first, self.stop = 0, 1
        self._scores = torch.zeros(root.shape, device=root.device)  # of nodes first..stop-1
        self._proposed_tokens: list[Tensor] = []  # [batch, nodes of a level * width] each
        self._proposed_scores: list[Tensor] = []
        self._expanded: list[Tensor] = []  # which of all that are proposed, [batch, width] each

    def expand(self, log_probabilities: Tensor, tokens: Tensor) -> None:
        """Propose children of nodes first..stop-1, and make the best of them the next nodes to run.

        Both [batch, stop - first, width]; see `likeliest`.
        """
        scores = (self._scores[..., None] + log_probabilities).flatten(1)
        tokens = tokens.flatten(1)
        before = sum(level.shape[1] for level in self._proposed_tokens)
        self._proposed_tokens.append(tokens)
        self._proposed_scores.append(scores)
        if len(self._proposed_tokens) == self.plan.depth:
            return
        ordered, order = scores.sort(dim=1, descending=True, stable=True)
        self._scores, chosen = ordered[:, : self.plan.width], order[:, : self.plan.width]
        self._expanded.append(chosen + before)
        self.below = chosen // self.plan.width
        above = self.visible[:, self.first : self.stop].gather(1, along(self.below, self.plan.span))
        first, now = self.first, slice(self.stop, self.stop + self.plan.width)
        self.tokens[:, now] = tokens.gather(1, chosen)
        self.parents[:, now] = self.below + first
        self.visible[:, now] = above | self.plan.itself[now]
        self.first, self.stop = now.start, now.stop

    def keep(self) -> Kept:
        """Keep the best of all proposed nodes. Those not run yet take the places from `plan.expanded` on."""
        plan = self.plan
        scores = torch.cat(self._proposed_scores, dim=1)
        ordered, order = scores.sort(dim=1, descending=True, stable=True)
        ordered, order = ordered[:, : plan.count], order[:, : plan.count]
        # 1. Where each is run: expanded nodes have a place, the others get theirs in this order.
        place = torch.zeros_like(scores, dtype=torch.long)
        if self._expanded:
            ran = plan.order[:, 1 : plan.expanded].expand(scores.shape[0], -1)
            place = place.scatter(1, torch.cat(self._expanded, dim=1), ran)
        place = place.gather(1, order)
        unrun = place == 0
        place = torch.where(unrun, unrun.cumsum(1) + (plan.expanded - 1), place)
        # 2. Fill the new places.
        parents = plan.parent[order]  # among the run nodes
        tokens = torch.cat(self._proposed_tokens, dim=1).gather(1, order)
        self.tokens.scatter_(1, place, tokens)
        self.parents.scatter_(1, place, parents)
        self.level = self.level.scatter(1, place, plan.level[order])
        self.first, self.stop = plan.expanded, plan.span
        parents_now = self.parents[:, self.first : self.stop].clamp(min=0)  # padding sees the root
        self.visible[:, self.first : self.stop] |= self.visible.gather(1, along(parents_now, plan.span))
        # 3. Count among the kept nodes instead: the root is the first.
        run = torch.cat([place.new_zeros((place.shape[0], 1)), place], dim=1)
        among_kept = torch.zeros_like(self.tokens).scatter(
            1, place, plan.order[:, 1 : run.shape[1]].expand_as(place)
        )
        among_kept = torch.cat(
            [parents.new_full((run.shape[0], 1), -1), among_kept.gather(1, parents)], dim=1
        )
        return Kept(run, among_kept, F.pad(ordered > -torch.inf, (1, 0), value=True))


def along(index: Tensor, size: int) -> Tensor:
    """An index [batch, n] of rows, for `gather` from [batch, rows, size]: [batch, n, size]."""
    return index[..., None].expand(-1, -1, size)


def likeliest(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens and the logarithms of their probabilities.

    logits [..., vocab] -> log-probabilities and tokens, [..., width] each. What is not a number counts as impossible.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    values, tokens = logits.log_softmax(dim=-1).topk(width)
    return values.nan_to_num(nan=-torch.inf, neginf=-torch.inf), tokens
