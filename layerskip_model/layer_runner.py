"""Decoder layers, run one by one over a cache of ours: a model's own, or those that a drafter has beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerskip_model.backbone import Backbone
from layerskip_model.context import MASKED, Context, KeyValues, Ragged, Scattered, Span, Tables
from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import FLASH_ATTENTION
from layerskip_model.fused_layer import FusedLayer, NotFusible, fuse, signed
from layerskip_model.rope import Rope


class LayerRunner:
    """Layers of a backbone's kind, with what they need beside the states: rotary tables, masks, a cache.

    Attributes:
        layers: as they are called where they are not fused.
        kinds: each layer's attention kind.
        windows: attention kind -> sliding window in tokens, None for full attention.
        rope: their own RoPE, None for the backbone's.
        fused: the layers as they are run, where all of them are made of Llama's parts.
        fixed_shapes: whether drafts should have the same number of rows at every step.

    `device` and `dtype` are those of the states. `fuse_layers=False` leaves the layers' weights where they are, as
    for layers that go on training. Raises UserError for an attention implementation that is not known.
    """

    fixed_shapes = False

    def __init__(
        self,
        backbone: Backbone,
        layers: Sequence[nn.Module],
        kinds: Sequence[str],
        windows: dict[str, int | None],
        *,
        device: torch.device,
        dtype: torch.dtype,
        rope: Rope | None = None,
        fuse_layers: bool = True,
    ) -> None:
        self.backbone = backbone
        self.layers = layers
        self.num_layers = len(layers)
        self.kinds = list(kinds)
        self.windows = windows
        self.rope = rope
        self.device = device
        self.dtype = dtype
        self._attention: str = backbone.config._attn_implementation
        if not self.takes_masks and "flash" not in self._attention:  # flash has names in a kernel hub, too
            raise UserError(
                f"attn_implementation='{self._attention}' is not known here; load the model with one of "
                f"{', '.join((*MASKED, *FLASH_ATTENTION))}"
            )
        self.fused = self._fused_layers() if fuse_layers else None

    def _fused_layers(self) -> list[FusedLayer] | None:
        """The layers fused, where all of them can be."""
        if self._attention != "sdpa" or getattr(self.backbone.config, "attn_logit_softcapping", None):
            return None
        try:
            return fuse(self.layers)
        except NotFusible:
            return None

    def run(self, hidden: Tensor, start: int, stop: int, context: Context) -> Tensor:
        """Run layers start..stop-1. What enters the first [batch, rows, width] -> [batch, rows, hidden]."""
        if start == stop:
            return hidden
        if self.fused is not None:
            flat = hidden.flatten(0, 1)  # [batch * rows, width]
            for fused, kind in zip(self.fused[start:stop], self.kinds[start:stop], strict=True):
                flat = fused(flat, hidden.shape[0], context, kind)
            return flat.view(*hidden.shape[:2], -1)
        for layer, kind in zip(self.layers[start:stop], self.kinds[start:stop], strict=True):
            output = layer(
                hidden,
                attention_mask=context.masks[kind],
                position_ids=context.position if self.takes_masks else None,  # flash looks at their values
                past_key_values=context.cache,
                use_cache=True,
                position_embeddings=context.rotary[kind],
            )
            hidden = output if isinstance(output, Tensor) else output[0]
        return hidden

    def run_reading(
        self, hidden: Tensor, start: int, stop: int, context: Context, layers: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`run`, and the states [batch, rows, hidden] that leave those of `layers` that are run."""
        states = {}
        for layer in sorted(set(layers)):
            if start <= layer < stop:
                hidden = states[layer] = self.run(hidden, start, layer + 1, context)
                start = layer + 1
        return self.run(hidden, start, stop, context), states

    def ragged(self, cache: KeyValues, tables: Tables, begin: Tensor, ahead: Tensor, end: int) -> Ragged:
        """See `Ragged`. Raises UserError where the model's attention takes no mask."""
        self._require_masks()
        return Ragged(cache, tables, begin, ahead, end)

    def scattered(
        self, cache: KeyValues, tables: Tables, position: Tensor, seen: Tensor, key_position: Tensor
    ) -> Scattered:
        """See `Scattered`. Raises UserError where the model's attention takes no mask."""
        self._require_masks()
        return Scattered(cache, tables, position, seen, key_position)

    @property
    def takes_masks(self) -> bool:
        """Whether the model's attention does: trees and texts of different lengths in one batch need it."""
        return self._attention in MASKED

    def _require_masks(self) -> None:
        if not self.takes_masks:
            raise UserError(
                f"attn_implementation='{self._attention}' takes no mask, so it decodes neither trees nor texts of "
                "different lengths in one batch; use sdpa"
            )

    def span(self, cache: KeyValues, tables: Tables, begin: int, count: int) -> Span:
        """See `Span`."""
        return Span(cache, tables, begin, count, self._attention)

    def tables(self, horizon: int, capacity: int) -> Tables:
        """Positions 0..capacity-1 and their rotary tables.

        Rotary scalings that depend on the length of the text (dynamic, longrope) are those of a text of
        `horizon` tokens for the whole decode, so that all keys in the cache are alike, whatever the strategy.
        Positions beyond it are drafted but never emitted, and share the last entry.
        """
        position = torch.arange(capacity, device=self.device)[None]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        types = self.backbone.base.rotary_emb.rope_type
        types = set(types.values()) if isinstance(types, dict) else {types}
        covered = horizon if self.rope is None and types & {"dynamic", "longrope"} else capacity
        source = self.backbone if self.rope is None else self.rope
        rotary = {}
        for kind in self.windows:
            cos, sin = source.rotary(like, position[:, :covered], kind)
            tables = _extended(cos, capacity), _extended(sin, capacity)
            rotary[kind] = tables if self.fused is None else signed(*tables)
        return Tables(position, rotary, self.dtype, self.windows)


def _extended(table: Tensor, capacity: int) -> Tensor:
    """Repeat the last entry of [1, length, dim] up to [1, capacity, dim]."""
    missing = capacity - table.shape[1]
    return torch.cat((table, table[:, -1:].expand(-1, missing, -1)), dim=1) if missing > 0 else table
