"""Where keys and values lie after writing, keeping and cutting back."""

from __future__ import annotations

import torch
from torch import Tensor

from eval.decoding.cache import Cache, SlotView, SpanView


def entries(batch: int, rows: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 2, rows, 3, generator=torch.Generator().manual_seed(seed))


def test_span_writes_and_shows_views() -> None:
    cache = Cache(1, 2, 8)
    first, second = entries(1, 4), entries(1, 2, 1)
    SpanView(cache, 0, 4).update(first, -first, 1)
    keys, values = SpanView(cache, 4, 6).update(second, -second, 1, {"an": "older argument"})
    assert torch.equal(keys, torch.cat((first, second), dim=2))
    assert torch.equal(values, -keys)
    assert keys.untyped_storage().data_ptr() == cache.keys[1].untyped_storage().data_ptr()  # type: ignore[union-attr]
    assert cache.keys[0] is None  # a layer that does not run costs nothing


def test_slots_write_each_row_to_its_own_place() -> None:
    cache = Cache(2, 1, 8)
    new = entries(2, 3)
    slot = torch.tensor([[4, 2, 3], [5, 7, 6]])
    keys, values = SlotView(cache, torch.arange(2)[:, None], slot, 7).update(new, -new, 0)
    assert keys.shape == values.shape == (2, 2, 7, 3)
    stored = cache.keys[0]
    assert stored is not None
    for row in range(2):
        for node in range(3):
            assert torch.equal(stored[row, :, slot[row, node]], new[row, :, node])
    assert not stored[0, :, [0, 1, 5, 6, 7]].any()  # never NaN, whatever was in that memory


def test_keep_moves_the_accepted_nodes_into_place() -> None:
    cache = Cache(3, 1, 12)
    cache.lengths = [2, 5, 3]
    everything = entries(3, 12)
    SpanView(cache, 0, 12).update(everything.clone(), -everything, 0)
    slot = torch.tensor([[2, 5, 4, 3], [5, 6, 7, 8], [3, 4, 5, 6]])
    # Row 0 moves slots 4 and 3 to 3 and 4, which overlap; row 1 keeps its root; row 2 had ended.
    cache.keep([[0, 2, 3], [0], []], slot)
    assert cache.lengths == [5, 6, 3]
    expected = everything.clone()
    expected[0, :, 3], expected[0, :, 4] = everything[0, :, 4], everything[0, :, 3]
    assert torch.equal(cache.keys[0], expected)  # type: ignore[arg-type]
    assert torch.equal(cache.values[0], -expected)  # type: ignore[arg-type]


def test_keep_moves_nothing_for_chains() -> None:
    cache = Cache(2, 1, 6)
    everything = entries(2, 6)
    SpanView(cache, 0, 6).update(everything.clone(), everything, 0)
    cache.keep([[0, 1, 2], [0]])
    assert cache.lengths == [3, 1]
    assert torch.equal(cache.keys[0], everything)  # type: ignore[arg-type]
