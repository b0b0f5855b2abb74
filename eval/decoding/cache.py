"""One preallocated key-value cache for drafting and verification.

The committed prefix of row b fills slots 0..lengths[b]-1, where slot = position. Nodes that are being drafted
or verified are written after it, and `keep` makes an accepted path the new end of the prefix. Cutting back is
nothing but a shorter length. Layers with a sliding window keep everything; the mask hides what is too old.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Cache:
    """Keys and values of every layer, [batch, kv heads, capacity, head dim] each.

    A layer's tensors are made at its first write, with the shape, dtype and device of what is written.

    Attributes:
        lengths: committed tokens per row, known on the host.
    """

    def __init__(self, batch: int, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.lengths = [0] * batch
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's tensors, made now if these are the first keys and values that come."""
        stored_keys, stored_values = self.keys[index], self.values[index]
        if stored_keys is None or stored_values is None:
            # Zeros, because a masked slot still takes part with weight 0, and 0 * NaN is NaN.
            stored_keys = keys.new_zeros((*keys.shape[:2], self.capacity, keys.shape[3]))
            stored_values = values.new_zeros((*values.shape[:2], self.capacity, values.shape[3]))
            self.keys[index], self.values[index] = stored_keys, stored_values
        return stored_keys, stored_values

    def keep(self, path: list[list[int]], slot: Tensor | None = None) -> None:
        """Append the accepted nodes path[b], root first, to the committed prefix of each row b.

        `slot` [batch, nodes] says where they are; None where node i is i slots after the prefix, as in chains, so
        that some or all are in place already. The root is in place always.
        """
        moves = [
            (row, node, self.lengths[row] + node, self.lengths[row] + index)
            for row, nodes in enumerate(path)
            for index, node in enumerate(nodes)
            if index > 0 and (slot is not None or node != index)
        ]
        if moves:
            device = None if slot is None else slot.device
            row, node, source, target = torch.tensor(moves, device=device).unbind(1)
            self.move(row, source if slot is None else slot[row, node], target, len(self.keys))
        for index, nodes in enumerate(path):
            self.lengths[index] += len(nodes)

    def move(self, row: Tensor, source: Tensor, target: Tensor, stop: int) -> None:
        """Copy slots of rows of the batch, in layers 0..stop-1. The indices broadcast; overlaps are safe."""
        for stored in (*self.keys[:stop], *self.values[:stop]):
            if stored is not None:
                row, source, target = (index.to(stored.device) for index in (row, source, target))
                if len(self.lengths) == 1:  # of one row: several times as fast
                    stored.index_copy_(2, target.flatten(), stored.index_select(2, source.flatten()))
                else:
                    stored[row, :, target] = stored[row, :, source]  # the right side is a copy


@dataclass(frozen=True)
class SpanView:
    """Writes all rows to slots begin..end-1 and shows slots 0..end-1: slices and views only."""

    cache: Cache
    begin: int
    end: int

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        """See `layerskip_model.runner.KeyValues`."""
        stored_keys, stored_values = self.cache.layer(layer_idx, keys, values)
        stored_keys[:, :, self.begin : self.end] = keys
        stored_values[:, :, self.begin : self.end] = values
        return stored_keys[:, :, : self.end], stored_values[:, :, : self.end]


@dataclass(frozen=True)
class SlotView:
    """Writes each row of the batch to slots of its own and shows slots 0..extent-1.

    `row` [batch, 1] and `slot` [batch, rows] index the batch and the slots.
    """

    cache: Cache
    row: Tensor
    slot: Tensor
    extent: int

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        """See `layerskip_model.runner.KeyValues`."""
        stored_keys, stored_values = self.cache.layer(layer_idx, keys, values)
        row, slot = self.row.to(keys.device), self.slot.to(keys.device)
        stored_keys[row, :, slot] = keys.transpose(1, 2)  # [batch, rows, kv heads, head dim]
        stored_values[row, :, slot] = values.transpose(1, 2)
        return stored_keys[:, :, : self.extent], stored_values[:, :, : self.extent]
