"""A decoder layer of the target's own kind, with which drafting heads look at all states so far."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from layerskip_model.backbone import Backbone, model_device
from layerskip_model.context import KeyValues
from layerskip_model.rope import Rope
from layerskip_model.runner import KINDS, attention_kinds

MASKS = dict(zip(KINDS, (create_causal_mask, create_sliding_window_causal_mask), strict=True))


class DraftLayer(nn.Module):
    """One decoder layer of the target's class, as its first one is, with new weights in float32.

    It sees positions and documents as the target's layers do: their masks, and their rotary tables unless it has its
    own.

    Attributes:
        layer: the transformers layer, number 0 of whatever cache it runs over.
        kind: its attention, "full_attention" or "sliding_attention".
        width: of what enters it.
        rope: its own RoPE, where it was trained with another than the target's; else None.

    Raises UserError for a target whose attention can not be decoded here.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        kinds, _ = attention_kinds(backbone.config, backbone.num_layers)
        self.kind = kinds[0]
        self.width = backbone.hidden_size
        self.rope: Rope | None = None
        self._backbone = backbone  # no module: its weights are not this one's
        layer: Any = type(backbone.layers[0])
        with torch.device(model_device(backbone.layers[0])):
            self.layer: nn.Module = layer(backbone.config, 0).to(torch.float32)
        self.layer.apply(backbone.model._init_weights)

    def forward(
        self, hidden: Tensor, position_ids: Tensor | None = None, cache: KeyValues | None = None
    ) -> Tensor:
        """[batch, seq, width] -> [batch, seq, hidden], each state from those up to it.

        Where `position_ids` [batch, seq] restart at 0 a new document begins, which attends to itself only. `cache` is
        given the keys and values, and has nothing yet.
        """
        hidden = hidden.to(next(self.layer.parameters()).dtype)
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = MASKS[self.kind](
            config=self._backbone.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=position_ids,
        )
        output = self.layer(
            hidden,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=self.rotary(hidden, position_ids),
        )
        return output if isinstance(output, Tensor) else output[0]

    def rotary(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `Backbone.rotary`, for this layer."""
        source = self._backbone if self.rope is None else self.rope
        return source.rotary(like, position_ids, self.kind)


def new_norm(backbone: Backbone) -> nn.Module:
    """A norm like the model's final one, with weights of its own."""
    weights = {
        id(weight): nn.Parameter(
            torch.empty(getattr(weight, "ds_shape", weight.shape), dtype=torch.float32, device=weight.device)
        )
        for weight in backbone.norm.parameters()
    }
    norm = copy.deepcopy(backbone.norm, memo=weights)
    norm.apply(backbone.model._init_weights)
    return norm
