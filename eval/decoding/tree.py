"""Draft trees: what a drafter proposes and who sees whom in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draft:
    """A tree of n nodes per row. Node 0 is the root: the last emitted token, not in the cache yet.

    Attributes:
        tokens: [batch, n].
        parents: [batch, n], each smaller than its node's own index; -1 for the root (and for padding).
        position: [batch, n] in the text: the root's is the committed length, a child's one more than its
            parent's; padding may repeat the root's.
        slot: [batch, n] in the cache: distinct, in length..length+span-1 of its row; the root's is `length`.
        valid: [batch, n]; False marks padding.
        candidate: [batch, n]; False marks rows that ride along in the forward and are never accepted.
        entry_layer: the first layer that has not run yet for these nodes.
        hidden: [batch, n, hidden], the states that enter `entry_layer`; None to start from the tokens.
        q: for rules that sample, the distribution that each node's token but the root's was drawn from,
            [batch, n - 1, vocab].
        visible: [batch, n, n], True where node i sees node j (always itself); None for the rule of trees, its
            ancestors and itself. All nodes see the committed prefix.
        made: how many slots its making took, where that is more than its nodes: a drafter that made nodes and
            dropped them again leaves gaps.
        in_order: node i lies in slot length + i. Known without looking; so it is in chains.
        is_chain: every node's parent is the node before it, slot = position, `visible` is None. Known without
            looking.
        is_complete: every node is a valid candidate. Known without looking; False where it is not known.
    """

    tokens: Tensor
    parents: Tensor
    position: Tensor
    slot: Tensor
    valid: Tensor
    candidate: Tensor
    entry_layer: int = 0
    hidden: Tensor | None = None
    q: Tensor | None = None
    visible: Tensor | None = None
    made: int = 0
    in_order: bool = False
    is_chain: bool = False
    is_complete: bool = False

    @property
    def num_nodes(self) -> int:
        """Nodes per row of the batch, root and padding included."""
        return self.tokens.shape[1]

    @property
    def span(self) -> int:
        """The slots after the committed prefix that its nodes lie in, gaps included."""
        return max(self.made, self.num_nodes)


def ancestor_mask(parents: Tensor) -> Tensor:
    """Who is an ancestor of whom, oneself included. parents [batch, n] -> bool [batch, n, n].

    Repeated squaring doubles the generations that are reached, so that no step depends on the tree's values.
    """
    n = parents.shape[1]
    node = torch.arange(n, device=parents.device)
    reach = (parents[..., None] == node) | (node[:, None] == node)  # parent, or oneself
    for _ in range((n - 1).bit_length()):
        steps = reach.float()
        reach = steps @ steps > 0
    return reach


def by_slot(visible: Tensor, slot: Tensor, span: int) -> Tensor:
    """Turn a mask over nodes into one over slots. Slots of no node are seen by nobody.

    Shapes: visible [batch, rows, n] over nodes; slot [batch, n] counted from the row's committed length ->
    [batch, rows, span] over slots.
    """
    index = slot[:, None].expand_as(visible)
    return visible.new_zeros((*visible.shape[:2], span)).scatter(2, index, visible)


def after_prefix(visible: Tensor, length: Tensor, extent: int) -> Tensor:
    """Put a committed prefix, seen by everyone, before each row's own slots.

    Shapes: visible [batch, rows, n] over slots from `length` [batch, 1] on -> [batch, rows, extent] over all.
    """
    batch, rows, n = visible.shape
    offset = torch.arange(extent, device=visible.device) - length  # [batch, extent], negative in the prefix
    index = offset.clamp(0, n - 1)[:, None].expand(batch, rows, extent)
    return (offset < 0)[:, None] | (visible.gather(2, index) & (offset < n)[:, None])
