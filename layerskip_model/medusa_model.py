"""A language model with Medusa heads in training: Medusa-1 and Medusa-2 (arXiv 2401.10774, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.head_terms import HeadMeasures, HeadTerms, measure
from layerskip_model.lora import adapters_off
from layerskip_model.medusa import MedusaHeads, labels_ahead
from layerskip_model.token_loss import (
    IGNORE_INDEX,
    kl_divergence_sum,
    weighted_cross_entropy,
)


class MedusaModel(nn.Module):
    """A language model with Medusa heads, of which the heads train (Medusa-1) or both (Medusa-2).

    With `frozen` the model is in evaluation mode, has no gradients, and makes no logits in training: the heads learn
    from its last hidden states alone.
    """

    def __init__(self, model: PreTrainedModel, heads: MedusaHeads, *, frozen: bool) -> None:
        super().__init__()
        self.model = model.requires_grad_(False) if frozen else model
        self.backbone = Backbone(model)
        self.backbone.check()
        self.heads = heads
        self.frozen = frozen

    def train(self, mode: bool = True) -> Self:
        """As usual; a frozen model stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        weights: Sequence[float],
        position_ids: Tensor | None = None,
        *,
        distil: bool = False,
        features: Tensor | None = None,
    ) -> HeadTerms | HeadMeasures:
        """The terms of one micro-batch in training, the measurements in evaluation.

        `input_ids`, `labels`, `position_ids` [batch, seq] as for `labels_ahead`; `weights` [K + 1] of the terms, the
        model's own first. With `distil` that one is KL(teacher || model), the teacher being the model without its
        adapters, instead of the cross entropy. `features` [batch, seq, hidden] are the final states of a frozen model
        where they are known already; then it does not run.
        """
        ahead = labels_ahead(labels, self.heads.number, position_ids).flatten(1)  # [K + 1, batch * seq]
        if features is not None:
            hidden = features.to(self.model.dtype)  # as if the model had run
        else:
            with torch.no_grad() if self.frozen else nullcontext():
                hidden = self.backbone.final_states(input_ids, position_ids)  # [batch, seq, hidden]
        if not self.training:
            flat = hidden.flatten(0, 1)
            return measure(
                self.backbone, hidden, ahead, lambda k, labels: self.heads.predictions(k, flat, labels)
            )
        losses: list[Tensor | None] = [None]
        total = hidden.new_zeros((), dtype=torch.float32)
        if not self.frozen:
            teacher = self._teacher(input_ids, position_ids) if distil else None
            losses = [self._own_loss(hidden.flatten(0, 1), ahead[0], teacher)]
            assert losses[0] is not None
            total = weights[0] * losses[0]
        # Blocks and projections see only what counts for some head.
        rows = (ahead[1:] != IGNORE_INDEX).any(0).nonzero().squeeze(1)
        of_heads, each = self.heads.losses(
            hidden.flatten(0, 1).index_select(0, rows), ahead[1:, rows], weights[1:]
        )
        losses = [None if loss is None else loss.detach() for loss in losses]
        return HeadTerms(total + of_heads, [*losses, *each], (ahead != IGNORE_INDEX).sum(1))

    @torch.no_grad()
    def _teacher(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """The last hidden states of the model without its adapters, [batch * seq, hidden]."""
        self.model.eval()
        try:
            with adapters_off(self.model):
                return self.backbone.final_states(input_ids, position_ids).flatten(0, 1)
        finally:
            self.model.train()

    def _own_loss(self, hidden: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        if teacher is None:
            return self.backbone.at_head(
                hidden, lambda states, head: weighted_cross_entropy([states], [1.0], labels, head)[0]
            )
        counted = labels != IGNORE_INDEX
        return self.backbone.at_head(
            (hidden, teacher), lambda both, head: kl_divergence_sum(both[0], both[1], head, head, counted)
        )
