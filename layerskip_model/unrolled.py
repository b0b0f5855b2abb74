"""Several steps of a drafting layer for every place of a text at once (training-time test, arXiv 2503.01840).

In step 0 a layer reads the target's states. In step s it reads, at every place t, what it made there in step s - 1, as
it does when it drafts from t. So step s at t stands at position t + s, and it sees what drafting sees: step 0 at the
places up to t, and of the steps after it those at t alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig

from layerskip_model.head_map import chunk_bytes, sum_dtype
from layerskip_model.merged_attention import MergedAttention, halves

ATTENTION = "unrolled"  # the name under which transformers' layers find `_attention`


class Steps:
    """The keys and values of all steps so far, as the cache that a layer runs over.

    Attributes:
        position_ids: of step 0, [batch or 1, seq]; a document begins where they do not go on by one.
        window: how many positions the layer sees, None for all.
        is_whole: whether each row is one document, as far as is known.
        keys, values: step -> [batch, kv heads, seq, head dim].
    """

    # No dataclass: FSDP hands a layer copies of those.
    def __init__(self, position_ids: Tensor, window: int | None, *, is_whole: bool) -> None:
        self.position_ids = position_ids
        self.window = window
        self.is_whole = is_whole
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        """Take those of another step, and return them."""
        self.keys.append(keys)
        self.values.append(values)
        return keys, values

    @property
    def is_causal(self) -> bool:
        """Whether every place sees all of step 0 before it, as far as is known."""
        return self.is_whole and self.window is None

    @property
    def newest(self) -> int:
        """The step that was last begun."""
        return len(self.keys) - 1

    def later(self) -> list[int]:
        """The steps after step 0 that the newest one sees, itself included."""
        reach = self.newest if self.window is None else min(self.newest, self.window)
        return list(range(self.newest - reach + 1, self.newest + 1))

    def seen(self, step: int, begin: int, end: int) -> Tensor:
        """Which places of step 0 a later step sees from places begin..end-1: bool [batch or 1, rows, end]."""
        document = F.pad(self.position_ids.diff(dim=-1) != 1, (1, 0)).cumsum(-1)
        place = torch.arange(end, device=document.device)
        distance = place[begin:, None] - place
        seen = (distance >= 0) & (document[:, begin:end, None] == document[:, None, :end])
        return seen if self.window is None else seen & (distance + step < self.window)


@contextmanager
def attending_unrolled(config: PreTrainedConfig) -> Iterator[None]:
    """Layers with this configuration, called with `steps`, attend as the newest of them does."""
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    steps: Steps,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The newest of `steps`, a step after step 0, whose keys and values are in there already.

    By torch's own kernel where that can; else a few rows at a time, which backward computes again: scores are never
    held for the whole text. `query` [batch, heads, seq, head dim] -> [batch, seq, heads, head dim].
    """
    if query.device.type == "cpu" and not dropout and softcap is None and steps.is_causal:
        parts = [each[step] for each in (steps.keys, steps.values) for step in [0, *steps.later()]]
        query, *parts = [part.to(value.dtype) for part in (query, *parts)]  # they differ under autocast
        (keys, *own_keys), (values, *own_values) = halves(parts)
        merged = MergedAttention.apply(query, keys, values, scaling, *own_keys, *own_values)
        return merged.transpose(1, 2), None
    batch, heads, length, _dim = query.shape
    grouped = query.unflatten(1, (key.shape[1], -1))  # [batch, kv heads, group, seq, head dim]
    size = max(1, chunk_bytes(query.device) // (4 * batch * heads * length))
    outputs = []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        own = [each[step][:, :, begin:end] for each in (steps.keys, steps.values) for step in steps.later()]
        rows = checkpoint(
            _rows,
            grouped[:, :, :, begin:end],
            steps.keys[0][:, :, :end],
            steps.values[0][:, :, :end],
            partial(steps.seen, steps.newest, begin, end),
            (scaling, softcap, dropout),
            *own,
            use_reentrant=False,
            preserve_rng_state=dropout > 0.0,
        )
        outputs.append(rows.flatten(1, 2).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Callable[[], Tensor],
    settings: tuple[float, float | None, float],
    *own: Tensor,
) -> Tensor:
    """One softmax over the keys of step 0 and each row's own later ones.

    Shapes: query [batch, kv heads, group, rows, head dim]; keys, values [batch, kv heads, keys, head dim]; what
    `seen` gives [batch or 1, rows, keys]; own [batch, kv heads, rows, head dim], keys, then values, of each later step.
    """
    scaling, softcap, dropout = settings
    later = len(own) // 2
    own_keys, own_values = (torch.stack(part, dim=-2) for part in (own[:later], own[later:]))
    before = torch.einsum("bkgrd,bktd->bkgrt", query, keys)
    after = torch.einsum("bkgrd,bkrsd->bkgrs", query, own_keys)
    scores = torch.cat((before, after), dim=-1).to(sum_dtype(query.dtype)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = ~F.pad(seen(), (0, later), value=True)[:, None, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    shares = scores.softmax(dim=-1).to(values.dtype)
    if dropout:
        shares = F.dropout(shares, dropout)
    before, after = shares.split([keys.shape[-2], later], dim=-1)
    of_text = torch.einsum("bkgrt,bktd->bkgrd", before, values)
    return of_text + torch.einsum("bkgrs,bkrsd->bkgrd", after, own_values)


AttentionInterface.register(ATTENTION, _attention)
