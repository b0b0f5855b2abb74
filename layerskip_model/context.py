"""What the layers of one forward need beside the hidden states: positions, rotary tables, masks, the cache.

Everything that can be made once for a whole decode is, and a step takes views of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]  # cos, sin, each [1, rows, rotary dim], or as fused layers take them
MASKED = ("sdpa", "eager")  # attention that takes a mask; others are causal from the last row backwards


class KeyValues(Protocol):
    """Where a layer leaves the keys and values of its rows, and from where it gets those it may see."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        """Write those of these rows, [batch, kv heads, rows, head dim]; return all, [.., keys, head dim]."""
        ...


@dataclass(frozen=True)
class Tables:
    """Positions, rotary tables and masks of one decode, made once.

    Attributes:
        position: 0, 1, 2, ... [1, capacity].
        rotary: attention kind -> tables of all positions.
        dtype: of the masks.
        windows: attention kind -> sliding window in tokens, None for full attention.
        masks: see `chain_mask`.
    """

    position: Tensor
    rotary: dict[str, Rotary]
    dtype: torch.dtype
    windows: dict[str, int | None]
    masks: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def span(self, begin: int, end: int) -> dict[str, Rotary]:
        """The rotary tables of positions begin..end-1, as views."""
        return {kind: (cos[:, begin:end], sin[:, begin:end]) for kind, (cos, sin) in self.rotary.items()}

    def at(self, position: Tensor) -> dict[str, Rotary]:
        """The rotary tables of any positions [batch, rows]."""
        return {kind: (cos[0][position], sin[0][position]) for kind, (cos, sin) in self.rotary.items()}

    def chain_mask(self, kind: str, begin: int, count: int) -> Tensor:
        """The additive mask [1, 1, count, begin + count] of rows begin..begin+count-1, each after the other.

        Who sees whom depends on the distance alone, so one mask per number of rows is a view of all of them.
        """
        capacity = self.position.shape[1]
        if (kind, count) not in self.masks:
            key = torch.arange(-capacity, count, device=self.position.device)  # counted from `begin`
            row = torch.arange(count, device=key.device)[:, None]
            self.masks[kind, count] = self.additive(kind, key <= row, row, key)
        return self.masks[kind, count][None, None, :, capacity - begin : capacity + count]

    def additives(self, seen: Tensor, query: Tensor, key: Tensor) -> dict[str, Tensor | None]:
        """`additive` of every attention kind, for all heads, [batch, 1, rows, keys]."""
        return {kind: self.additive(kind, seen, query, key)[:, None] for kind in self.windows}

    def additive(self, kind: str, seen: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """A mask [..., rows, keys]: 0 where a row sees a key and no window hides it, else very negative.

        eager attention wants it so, and sdpa would make it so in every layer. Positions of rows and keys
        broadcast to the shape of `seen`.
        """
        window = self.windows[kind]
        if window is not None:
            seen = seen & (query - key < window)
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(self.dtype).min)


class Context(Protocol):
    """What the layers of one forward need beside the hidden states [batch, rows, hidden].

    Attributes:
        cache: takes the rows' keys and values, gives the visible ones.
        position: [batch or 1, rows].
        rotary: attention kind -> the rotary tables of those positions.
        masks: attention kind -> additive mask [batch or 1, 1, rows, keys], or None where none is needed.
        is_causal: where there is no mask, whether each row sees the keys up to its own only, instead of all.
    """

    @property
    def cache(self) -> KeyValues: ...
    @property
    def position(self) -> Tensor: ...
    @property
    def rotary(self) -> dict[str, Rotary]: ...
    @property
    def masks(self) -> dict[str, Tensor | None]: ...
    @property
    def is_causal(self) -> bool: ...


@dataclass
class _WhenAsked:
    """A context that makes its tables and masks when they are first asked for, and keeps them.

    functools' cached_property does the same, but cannot be compiled.
    """

    cache: KeyValues
    tables: Tables
    _rotary: dict[str, Rotary] | None = field(default=None, init=False)
    _masks: dict[str, Tensor | None] | None = field(default=None, init=False)

    @property
    def is_causal(self) -> bool:
        """There is a mask wherever more than one row is run."""
        return False

    @property
    def rotary(self) -> dict[str, Rotary]:
        """See `Context`."""
        if self._rotary is None:
            self._rotary = self._make_rotary()
        return self._rotary

    @property
    def masks(self) -> dict[str, Tensor | None]:
        """See `Context`."""
        if self._masks is None:
            self._masks = self._make_masks()
        return self._masks

    def _make_rotary(self) -> dict[str, Rotary]:
        raise NotImplementedError

    def _make_masks(self) -> dict[str, Tensor | None]:
        raise NotImplementedError


@dataclass
class Span(_WhenAsked):
    """The context of rows at positions begin..begin+count-1 of every text, which see everything before them.

    `cache` has to return the keys of positions 0..begin+count-1, in this order. One row needs no mask, and neither
    does a prefill under sdpa, unless a sliding window is shorter than the text. Attention that takes no mask
    knows what a chain means by itself, windows included.
    """

    begin: int
    count: int
    attention: str

    @property
    def end(self) -> int:
        """How many keys the last row sees."""
        return self.begin + self.count

    @property
    def is_causal(self) -> bool:
        """In a prefill without a mask."""
        return self.count > 1

    @property
    def position(self) -> Tensor:
        """[1, count], a view."""
        return self.tables.position[:, self.begin : self.end]

    def _make_rotary(self) -> dict[str, Rotary]:
        return self.tables.span(self.begin, self.end)

    def _make_masks(self) -> dict[str, Tensor | None]:
        """Views, but for the mask of a prefill, which would be as large as all others together."""
        if self.attention not in MASKED:
            return dict.fromkeys(self.tables.windows)
        no_mask = self.count == 1 or (self.begin == 0 and self.attention == "sdpa")
        masks: dict[str, Tensor | None] = {}
        for kind, window in self.tables.windows.items():
            if no_mask and (window is None or self.end <= window):
                masks[kind] = None
            elif self.begin == 0:
                key = self.position  # [1, count]
                query = key.mT  # [count, 1]
                masks[kind] = self.tables.additive(kind, key <= query, query, key)[None, None]
            else:
                masks[kind] = self.tables.chain_mask(kind, self.begin, self.count)
        return masks


@dataclass
class Ragged(_WhenAsked):
    """The context of chains that begin at `begin` [batch, 1], a place of its own for each row of the batch.

    `cache` has to return the keys of positions 0..end-1. `ahead`: 0, 1, 2, ... [1, rows].
    """

    begin: Tensor
    ahead: Tensor
    end: int

    @property
    def position(self) -> Tensor:
        """[batch, rows]."""
        return self.begin + self.ahead

    def _make_rotary(self) -> dict[str, Rotary]:
        return self.tables.at(self.position)

    def _make_masks(self) -> dict[str, Tensor | None]:
        query, key = self.position[..., None], self.tables.position[:, None, : self.end]
        return self.tables.additives(key <= query, query, key)


@dataclass
class Scattered(_WhenAsked):
    """The context of any rows, such as those of trees.

    Shapes: position [batch, rows]; seen [batch, rows, keys], True where a row may see a key (every row must see
    itself); key_position [batch or 1, keys], for the sliding windows.
    """

    position: Tensor
    seen: Tensor
    key_position: Tensor

    def _make_rotary(self) -> dict[str, Rotary]:
        return self.tables.at(self.position)

    def _make_masks(self) -> dict[str, Tensor | None]:
        query, key = self.position[..., None], self.key_position[:, None]
        return self.tables.additives(self.seen, query, key)
