"""In which order rows come: which row of which source is the p-th of a run, as a function of p."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from layerskip_model.layer_dropout import uniform_hash

Ints = NDArray[np.int64]
_ONE = 32  # shares are whole numbers over 2^32, so that nothing is lost to rounding late in a run


class RowOrder(Protocol):
    """The rows at places 0, 1, 2, ... of a run. Places [n] -> rows [n], without going through those before."""

    def __call__(self, places: Ints) -> Ints: ...


class EpochOrder:
    """All rows once an epoch, each epoch in another order, drawn from (*seed, epoch)."""

    def __init__(self, num_rows: int, *seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self._drawn: tuple[int, Ints] | None = None

    def __call__(self, places: Ints) -> Ints:
        epochs, within = np.divmod(places, self.num_rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            rows[now] = self._order(epoch)[within[now]]
        return rows

    def _order(self, epoch: int) -> Ints:
        if self._drawn is None or self._drawn[0] != epoch:
            order = np.random.default_rng([*self.seed, epoch]).permutation(self.num_rows)
            self._drawn = (epoch, order)
        return self._drawn[1]


class SourceOrder:
    """From which source the row at each place of a run comes, so that sources get their weights' shares.

    The sources are spread evenly, not drawn: one with a share w of what is left by those before it has
    floor(w p + u) of its first p places, u from the seed. So any stretch of a run has each source's share to
    within about a row, and how many rows of a source came before a place needs no counting.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.num_sources = len(weights)
        left = [sum(weights[source:]) for source in range(len(weights))]
        self.shares = [
            round(weight / rest * 2**_ONE) if rest else 0 for weight, rest in zip(weights, left, strict=True)
        ]
        draws = uniform_hash(seed, 0, np.arange(len(weights), dtype=np.uint64))
        self.offsets = (draws * 2**_ONE).astype(np.uint64)

    def __call__(self, places: Ints) -> tuple[Ints, Ints]:
        """Places [n] < 2^32 -> the source of each [n], and how many of its rows came before [n]."""
        sources, before = np.zeros_like(places), np.zeros_like(places)
        left = np.arange(len(places))  # of the places, those that are none of the sources so far
        remaining = places.astype(np.uint64)  # each one's place among those
        for source in range(self.num_sources):
            share, offset = np.uint64(self.shares[source]), self.offsets[source]
            count = (remaining * share + offset) >> np.uint64(_ONE)
            taken = ((remaining + np.uint64(1)) * share + offset) >> np.uint64(_ONE) > count
            sources[left[taken]], before[left[taken]] = source, count[taken]
            left, remaining = left[~taken], (remaining - count)[~taken]
        return sources, before


class WeightedOrder:
    """Rows of several sources one after the other, taken in the shares of their weights.

    Each source's rows come epoch after epoch, each in another order, whatever the others do.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sources = SourceOrder(weights, seed)
        self.orders = [EpochOrder(size, seed, source) for source, size in enumerate(sizes)]
        self.firsts = np.cumsum([0, *sizes[:-1]])

    def __call__(self, places: Ints) -> Ints:
        rows = np.empty_like(places)
        sources, before = self.sources(places)
        for source, order in enumerate(self.orders):
            now = sources == source
            rows[now] = self.firsts[source] + order(before[now]) if now.any() else 0
        return rows
