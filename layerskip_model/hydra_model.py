"""A frozen language model with Hydra heads in training (arXiv 2402.05109, sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.head_map import HeadMap
from layerskip_model.head_terms import TOP, HeadMeasures, HeadTerms, measure
from layerskip_model.hydra import HydraHeads
from layerskip_model.medusa import labels_ahead, losses_over
from layerskip_model.token_loss import (
    IGNORE_INDEX,
    top_predictions,
    weighted_cross_entropy,
    weighted_kl_divergence,
)

StateOf = Callable[[int], Tensor]


class HydraModel(nn.Module):
    """A language model, frozen and in evaluation mode, with Hydra heads that train.

    `loss` is what they learn from. teacher: the model's own distribution at the place that a head predicts, by
    KL(model || head), whose gradient is that of the cross entropy against it; labels: the text. A place counts for
    both where its label counts.
    """

    def __init__(
        self, model: PreTrainedModel, heads: HydraHeads, *, loss: Literal["teacher", "labels"]
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.backbone = Backbone(model)
        self.backbone.check()
        self.heads = heads
        self.loss = loss

    def train(self, mode: bool = True) -> Self:
        """As usual; the model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        weights: Sequence[float],
        position_ids: Tensor | None = None,
        *,
        features: Tensor | None = None,
    ) -> HeadTerms | HeadMeasures:
        """The terms of one micro-batch in training, the measurements in evaluation.

        `input_ids`, `labels`, `position_ids` [batch, seq] as for `labels_ahead`; `weights` [K + 1] of the terms, of
        which the first is nobody's. `features` [batch, seq, hidden] are the model's final states where they are known
        already; then it does not run.
        """
        ahead = labels_ahead(labels, self.heads.number, position_ids).flatten(1)  # [K + 1, batch * seq]
        with torch.no_grad():
            embedded = self.backbone.embed(input_ids).flatten(0, 1)  # [batch * seq, hidden]
            if features is not None:
                hidden = features.to(self.model.dtype)  # as if the model had run
            else:
                hidden = self.backbone.final_states(input_ids, position_ids)  # [batch, seq, hidden]
        read = hidden if self.heads.prefix is None else self.heads.prefix(hidden, position_ids)
        flat, read = hidden.flatten(0, 1), read.flatten(0, 1)
        if not self.training:
            every = torch.arange(len(flat), device=flat.device)
            return self._measurements(hidden, ahead, self._states(read, embedded, every))
        # Blocks and projections see only what counts for some head.
        rows = (ahead[1:] != IGNORE_INDEX).any(0).nonzero().squeeze(1)
        states = self._states(read, embedded, rows)
        if self.loss == "teacher":
            total, losses = self._divergences(states, flat, ahead[1:, rows], rows, weights[1:])
        else:
            total, losses = self._cross_entropies(states, ahead[1:, rows], weights[1:])
        return HeadTerms(total, [None, *losses], (ahead != IGNORE_INDEX).sum(1))

    def _states(self, read: Tensor, embedded: Tensor, rows: Tensor) -> StateOf:
        """Head index (0..K-1) -> what it projects at some rows of `read` [batch * seq, hidden]."""
        # The tokens after a row. Where there are none in its text nothing counts, and any will do.
        after = rows[:, None] + 1 + torch.arange(self.heads.number, device=rows.device)
        after.clamp_(max=len(embedded) - 1)
        own = read.index_select(0, rows)
        return lambda index: self.heads.state(index, own, embedded[after[:, : index + 1]])

    def _cross_entropies(
        self, states: StateOf, labels: Tensor, weights: Sequence[float]
    ) -> tuple[Tensor, list[Tensor]]:
        """Against the text; `labels` [K, rows]."""

        def loss(own: Sequence[Tensor], heads: Sequence[int], head: HeadMap) -> tuple[Tensor, list[Tensor]]:
            return weighted_cross_entropy(own, [weights[k] for k in heads], [labels[k] for k in heads], head)

        return losses_over(self.heads.projections, self.heads.number, states, loss)

    def _divergences(
        self, states: StateOf, hidden: Tensor, labels: Tensor, rows: Tensor, weights: Sequence[float]
    ) -> tuple[Tensor, list[Tensor]]:
        """From the model's own distributions; `labels` [K, rows] say where, `hidden` [batch * seq, hidden] what."""
        number = self.heads.number
        # The model predicts the token of head k (1..K) from k places further on.
        ahead = rows + 1 + torch.arange(number, device=rows.device)[:, None]  # [K, rows]
        places = ahead.masked_fill(labels == IGNORE_INDEX, IGNORE_INDEX)

        def within(teacher: Tensor, teacher_head: HeadMap) -> tuple[Tensor, list[Tensor]]:
            def loss(
                own: Sequence[Tensor], heads: Sequence[int], head: HeadMap
            ) -> tuple[Tensor, list[Tensor]]:
                return weighted_kl_divergence(
                    own,
                    [weights[k] for k in heads],
                    teacher,
                    [places[k] for k in heads],
                    head,
                    teacher_head,
                )

            return losses_over(self.heads.projections, number, states, loss)

        return self.backbone.at_head(hidden, within)

    def _measurements(self, hidden: Tensor, ahead: Tensor, states: StateOf) -> HeadMeasures:
        def predict(index: int, labels: Tensor) -> tuple[Tensor, Tensor]:
            return self.heads.projection(index)(
                states(index), lambda state, head: top_predictions(state, labels, head, TOP)
            )

        found = measure(self.backbone, hidden, ahead, predict)
        if self.loss == "labels":
            return found
        every = torch.arange(ahead.shape[1], device=ahead.device)
        ones = [1.0] * self.heads.number
        with torch.no_grad():
            _, each = self._divergences(states, hidden.flatten(0, 1), ahead[1:], every, ones)
        return replace(found, divergences=each)
