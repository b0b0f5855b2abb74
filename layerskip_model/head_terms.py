"""What a forward of a model with drafting heads leaves, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip_model.backbone import Backbone
from layerskip_model.token_loss import IGNORE_INDEX, top_predictions

TOP = 5  # of a head's choices, how many are looked through for the right token


@dataclass(frozen=True)
class HeadTerms:
    """What a training forward leaves. Sums over tokens; index 0 is the language model's own term, k head k's.

    Attributes:
        total: the weighted sum of all terms, with its gradient.
        losses: each term, without gradient; None for a model that has none of its own.
        counts: tokens that count in each term, [K + 1].
    """

    total: Tensor
    losses: list[Tensor | None]
    counts: Tensor


@dataclass(frozen=True)
class HeadMeasures:
    """What a forward in evaluation leaves, by index as in HeadTerms; everything a sum over tokens.

    Attributes:
        losses, top1, top5: cross entropy; right first choices; right tokens among the first five.
        agreement: of head k at t with the model's own first choice k places on. [0] is nothing.
        counts: tokens that count in each, [K + 1].
        accepted: tokens that each place would gain by the chain of first choices, the model's own among them.
        places: where that chain can be judged to its end.
        divergences: KL(model || head k) where heads learn from the model's distribution, [K]; else None.
    """

    losses: list[Tensor]
    top1: list[Tensor]
    top5: list[Tensor]
    agreement: list[Tensor]
    counts: Tensor
    accepted: Tensor
    places: Tensor
    divergences: list[Tensor] | None = None


def measure(
    backbone: Backbone,
    hidden: Tensor,
    ahead: Tensor,
    predict: Callable[[int, Tensor], tuple[Tensor, Tensor]],
) -> HeadMeasures:
    """The measurements of heads on a text whose final states are `hidden` [batch, seq, hidden].

    `ahead` [K + 1, batch * seq] are the labels of `labels_ahead`; `predict(index, labels)` is `top_predictions` of head
    `index` (0..K-1), the first TOP.

    A head that reads tokens reads those of the text. In a text that the model wrote greedily they are what it would
    have drafted as long as all heads before were right, so that `accepted` is what decoding would gain; in another
    text they are a better path than its own choices, and it is what a model of that text would gain.
    """
    shape, flat = hidden.shape[:2], hidden.flatten(0, 1)
    counted = ahead != IGNORE_INDEX  # [K + 1, batch * seq]
    losses, choices, top1, top5 = [], [], [], []
    for k, labels in enumerate(ahead):
        if k == 0:
            nll, best = backbone.at_head(
                flat, lambda states, head: top_predictions(states, ahead[0], head, TOP)
            )
        else:
            nll, best = predict(k - 1, labels)
        right = (best == labels[:, None]) & counted[k][:, None]  # [batch * seq, TOP]
        losses.append(nll.sum())
        top1.append(right[:, 0].sum())
        top5.append(right.sum())
        choices.append(best[:, 0].view(shape))
    agreed = torch.zeros_like(counted).view(len(ahead), *shape)
    for k in range(1, min(len(ahead), shape[1])):
        agreed[k, :, :-k] = choices[k][:, :-k] == choices[0][:, k:]
    agreed = agreed.flatten(1) & counted
    fits = counted[1:].all(0)  # [batch * seq]
    gained = 1 + agreed[1:].to(torch.int64).cumprod(0).sum(0)
    return HeadMeasures(
        losses=losses,
        top1=top1,
        top5=top5,
        agreement=list(agreed.sum(1)),
        counts=counted.sum(1),
        accepted=(gained * fits).sum(),
        places=fits.sum(),
    )
