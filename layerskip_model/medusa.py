"""Medusa heads (arXiv 2401.10774): each guesses, from the last hidden state, a token further on than the LM head's.

With the LM head predicting the next token, head k (k = 1..K) predicts the token k + 1 places after the one it reads.
A head is n residual blocks and a projection to the vocabulary. The blocks begin as the identity and the projection as a
copy of the LM head, so that every head begins as the LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from layerskip_model.backbone import Backbone
from layerskip_model.head_map import HeadMap
from layerskip_model.head_terms import TOP
from layerskip_model.token_loss import (
    IGNORE_INDEX,
    top_predictions,
    weighted_cross_entropy,
)

Result = TypeVar("Result")


class ResBlock(nn.Module):
    """x + SiLU(W x + b), section 2.1.1 of the paper; W and b begin at zero: the identity."""

    def __init__(self, hidden: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden, device=device, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return x + F.silu(self.linear(x))


class Projection(nn.Module):
    """The matrix from a head's state to logits; scale and soft cap are the model's.

    Only its own forward reads the weights, as engines that shard parameters have gathered them only then.
    """

    bias: nn.Parameter | None  # [vocab]

    def __init__(self, head: HeadMap, shape: tuple[int, int], *, has_bias: bool = False) -> None:
        super().__init__()
        device = head.weight.device
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))  # [vocab, hidden]
        bias = torch.zeros(shape[0], dtype=torch.float32, device=device) if has_bias else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.scale, self.softcap = head.scale, head.softcap

    def forward(self, states: Any, compute: Callable[[Any, HeadMap], Result]) -> Result:
        """`compute(states, head map)`."""
        return compute(states, self.map())

    def map(self) -> HeadMap:
        """The map from a head's state to logits."""
        return HeadMap(self.weight, self.bias, self.scale, self.softcap)


class MedusaHeads(nn.Module):
    """K heads, float32 as everything that trains; they read the model's final normed hidden state.

    Attributes:
        blocks: for each head its own n residual blocks.
        projections: one for each head, or one that all share.
    """

    def __init__(self, backbone: Backbone, *, heads: int, layers: int, shared: bool) -> None:
        super().__init__()
        head = backbone.head_map()
        shape = (backbone.vocab_size, backbone.hidden_size)
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResBlock(shape[1], head.weight.device) for _ in range(layers)) for _ in range(heads)
        )
        self.projections = nn.ModuleList(Projection(head, shape) for _ in range(1 if shared else heads))

    @classmethod
    def new(cls, backbone: Backbone, *, heads: int, layers: int, shared: bool) -> Self:
        """Heads that say what the LM head says. A bias of the LM head is not part of any format, and left out."""
        made = cls(backbone, heads=heads, layers=layers, shared=shared)
        weight = whole(backbone.head.weight)
        for projection in made.projections:
            projection.get_parameter("weight").data.copy_(weight)
        return made

    @property
    def number(self) -> int:
        """K."""
        return len(self.blocks)

    @property
    def layers(self) -> int:
        """n, of each head."""
        return len(self._of(0))

    @property
    def shared(self) -> bool:
        """Whether all heads have one projection."""
        return len(self.projections) < self.number

    def state(self, index: int, hidden: Tensor) -> Tensor:
        """What head `index` (0..K-1) projects: [..., hidden] -> [..., hidden], in the heads' dtype."""
        state = hidden.to(self.projections[0].get_parameter("weight").dtype)
        for block in self._of(index):
            state = block(state)
        return state

    def logits(self, index: int, hidden: Tensor) -> Tensor:
        """Of head `index`: [..., hidden] -> [..., vocab]."""
        projection = self.projections[0 if self.shared else index]
        return projection(self.state(index, hidden), lambda states, head: head.logits(states))

    def losses(self, hidden: Tensor, labels: Tensor, weights: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        """sum_k w_k CE_k, and each CE_k without gradient, both sums over the tokens that count.

        `hidden` [tokens, hidden]; `labels` [K, tokens], each head's own, IGNORE_INDEX where there is none.
        """

        def loss(
            states: Sequence[Tensor], heads: Sequence[int], head: HeadMap
        ) -> tuple[Tensor, list[Tensor]]:
            return weighted_cross_entropy(
                states, [weights[k] for k in heads], [labels[k] for k in heads], head
            )

        return losses_over(self.projections, self.number, lambda index: self.state(index, hidden), loss)

    def predictions(self, index: int, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`top_predictions` of head `index`, the first TOP: `hidden` [tokens, hidden], `labels` [tokens]."""
        projection = self.projections[0 if self.shared else index]
        return projection(
            self.state(index, hidden), lambda state, head: top_predictions(state, labels, head, TOP)
        )

    def _of(self, index: int) -> nn.ModuleList:
        blocks = self.blocks[index]
        assert isinstance(blocks, nn.ModuleList)
        return blocks


def losses_over(
    projections: nn.ModuleList,
    number: int,
    state: Callable[[int], Tensor],
    loss: Callable[[Sequence[Tensor], Sequence[int], HeadMap], tuple[Tensor, list[Tensor]]],
) -> tuple[Tensor, list[Tensor]]:
    """The sum of what `loss` weighs and adds up, and each head's loss without gradient; sums over tokens.

    `state(index)` is what a head projects, `loss(states, heads, head map)` is called for the heads of each projection:
    for all of them at once where they share one, so that it has one gradient.
    """
    if len(projections) < number:
        states = tuple(state(index) for index in range(number))
        return projections[0](states, lambda own, head: loss(own, range(number), head))
    parts, losses = [], []
    for index, projection in enumerate(projections):

        def compute(states: tuple[Tensor], head: HeadMap, index: int = index) -> tuple[Tensor, list[Tensor]]:
            return loss(states, [index], head)

        part, own = projection((state(index),), compute)
        parts.append(part)
        losses += own
    return torch.stack(parts).sum(), losses


def whole(parameter: Tensor) -> Tensor:
    """A parameter's values, also where DeepSpeed has split it over the ranks. Every rank calls it."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        return parameter.data.clone()


def labels_ahead(labels: Tensor, heads: int, position_ids: Tensor | None = None) -> Tensor:
    """The labels of the LM head and of heads 1..K: [batch, seq] -> [K + 1, batch, seq].

    `labels` are shifted by one already: labels[t] follows the token at t. Head k's at t is labels[t + k], where that
    place is in the row, counts and is of the same document: the positions go on by one from t to there.
    """
    ahead = labels.new_full((heads + 1, *labels.shape), IGNORE_INDEX)
    ahead[0] = labels
    for k in range(1, min(heads, labels.shape[1] - 1) + 1):
        there = labels[:, k:]
        if position_ids is not None:
            is_same = position_ids[:, k:] - position_ids[:, :-k] == k
            there = there.masked_fill(~is_same, IGNORE_INDEX)
        ahead[k, :, :-k] = there
    return ahead
