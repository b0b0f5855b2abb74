"""Rows of a fixed length: windows of a stream of documents, or whole examples packed into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerskip_model.token_loss import IGNORE_INDEX
from train.data.tokens import PackedTokens

Ints = NDArray[np.int64]


class Rows(Protocol):
    """What batches are made of: rows of tensors by index. Each has `labels` and the same keys and shapes."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Tensor]: ...


class MeasuredRows(Rows, Protocol):
    """Rows that know how much they predict in all, and for how many bytes of text."""

    @property
    def predicted(self) -> int: ...

    @property
    def bytes(self) -> int: ...


class WindowRows:
    """Windows of `length` inputs over documents end to end, in which every token but the first is predicted once.

    Row i is made of tokens[i * length : i * length + length + 1] by `window_row`. The short window at the end
    is dropped, or with `keep_last` filled up with labels IGNORE_INDEX.
    """

    def __init__(self, packed: PackedTokens, length: int, *, separate: bool, keep_last: bool = False) -> None:
        self.ids = packed.ids()  # [tokens]
        self.starts = packed.starts()  # [documents]
        self.length = length
        self.separate = separate
        self.shared_end = packed.shared_end
        self.bytes = packed.bytes
        pairs = max(0, packed.tokens - 1)
        self.num_rows = -(-pairs // length) if keep_last else pairs // length
        pairs = min(pairs, self.num_rows * length)
        crossing = int(np.searchsorted(self.starts, np.uint64(pairs), side="right")) - 1
        self.predicted = pairs - (crossing if separate and not self.shared_end and pairs else 0)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        begin = row * self.length
        window = self.ids[begin : begin + self.length + 1].astype(np.int64)
        # uint64, as the array: for another type numpy would convert all of it.
        bounds = np.array([begin, begin + len(window)], dtype=np.uint64)
        first, last = np.searchsorted(self.starts, bounds)
        starts = self.starts[first:last].astype(np.int64) - begin
        row_values = window_row(
            window, starts, self.length, separate=self.separate, shared_end=self.shared_end
        )
        return as_tensors(row_values)


def window_row(
    window: Ints, starts: Ints, length: int, *, separate: bool, shared_end: bool
) -> dict[str, Ints]:
    """{"input_ids", "labels"}, both [length], of up to length + 1 tokens: labels[t] follows input_ids[t].

    `starts` are the places in the window where documents begin. With `separate` there are "position_ids" too,
    which restart there, and no label crosses into another document, unless the token that begins it is the
    one that ends a text. A missing end is filled with the first token and labels IGNORE_INDEX.
    """
    missing = length + 1 - len(window)
    inputs = np.pad(window[:-1], (0, missing), constant_values=window[0])
    labels = np.pad(window[1:], (0, missing), constant_values=IGNORE_INDEX)
    if not separate:
        return {"input_ids": inputs, "labels": labels}
    if not shared_end:
        labels[starts[starts > 0] - 1] = IGNORE_INDEX
    restarts = np.append(starts, len(window) - 1)  # what fills the row is another document
    return {"input_ids": inputs, "labels": labels, "position_ids": _restarting_positions(restarts, length)}


class ExampleRows:
    """Whole examples, best-fit packed into rows of `length` inputs (see `best_fit` and `example_row`).

    An example of n tokens takes n - 1 places, as its last one is only predicted. One that is longer than a row
    is cut at its end (`cut` counts them), and left out where nothing of it is predicted then (`left_out`).
    """

    def __init__(self, packed: PackedTokens, length: int, *, separate: bool) -> None:
        self.ids, self.counted = packed.ids(), packed.counted()  # [tokens]
        self.length = length
        self.separate = separate
        starts = packed.starts().astype(np.int64)
        whole_ends = np.append(starts[1:], packed.tokens)[: len(starts)]
        ends = np.minimum(whole_ends, starts + length + 1)
        predicted = _sums_between(self.counted, starts + 1, ends)  # [examples]
        kept = predicted > 0
        self.cut = int(((whole_ends > ends) & kept).sum())
        self.left_out = int((~kept).sum())
        self.predicted = int(predicted.sum())
        uncut = int(_sums_between(self.counted, starts + 1, whole_ends).sum())
        self.bytes = round(
            packed.bytes * self.predicted / max(1, uncut)
        )  # of what cutting leaves, on average
        self.starts, self.ends = starts[kept], ends[kept]
        self.plan = best_fit(self.ends - self.starts - 1, length)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not 0 <= row < len(self.plan):
            raise IndexError(f"row {row} of {len(self.plan)}")
        spans = [slice(self.starts[example], self.ends[example]) for example in self.plan[row]]
        examples = [(self.ids[span].astype(np.int64), np.asarray(self.counted[span])) for span in spans]
        return as_tensors(example_row(examples, self.length, separate=self.separate))


def example_row(
    examples: Sequence[tuple[Ints, NDArray[np.bool_]]], length: int, *, separate: bool
) -> dict[str, Ints]:
    """A row of whole examples, each its (ids, counted): as `window_row`, with labels only where `counted`."""
    inputs = np.full(length, examples[0][0][0])
    labels = np.full(length, IGNORE_INDEX)
    restarts = []
    place = 0
    for ids, counted in examples:
        restarts.append(place)
        end = place + len(ids) - 1
        inputs[place:end] = ids[:-1]
        labels[place:end] = np.where(counted[1:], ids[1:], IGNORE_INDEX)
        place = end
    row = {"input_ids": inputs, "labels": labels}
    if separate:
        row["position_ids"] = _restarting_positions(np.array([*restarts, place]), length)
    return row


def best_fit(sizes: Ints, capacity: int) -> list[list[int]]:
    """Put things of 1..capacity into as few bins as best-fit decreasing finds; the things of each bin.

    The largest goes first, each into the fullest bin that has room for it. That takes at most 11/9 of the fewest
    bins possible and a few more (Johnson 1973); the same sizes give the same bins.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # the bins that have this much room
    rooms = 0  # bit r is set where some bin has room r: the least sufficient one is found without a search
    for thing in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[thing])
        sufficient = rooms >> size
        if sufficient:
            room = size + (sufficient & -sufficient).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(thing)
        if room > size:
            with_room[room - size].append(chosen)
            rooms |= 1 << (room - size)
    return bins


class JoinedRows:
    """The rows of several sources, one after the other."""

    def __init__(self, parts: Sequence[MeasuredRows]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        self.predicted = sum(part.predicted for part in parts)
        self.bytes = sum(part.bytes for part in parts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = int(np.searchsorted(self.ends, row, side="right"))
        return self.parts[part][row - int(self.ends[part]) + len(self.parts[part])]


def as_tensors(row: dict[str, Ints]) -> dict[str, Tensor]:
    """The same numbers as int64 tensors."""
    return {key: torch.from_numpy(np.asarray(values, dtype=np.int64)) for key, values in row.items()}


def _restarting_positions(restarts: Ints, length: int) -> Ints:
    """Places counted from the last restart at or before them; from 0 before the first. # [length]"""
    begins = np.zeros(length, dtype=np.int64)
    inside = restarts[restarts < length]
    begins[inside] = inside
    return np.arange(length) - np.maximum.accumulate(begins)


def _sums_between(flags: NDArray[np.bool_], begins: Ints, ends: Ints) -> Ints:
    """How many flags are set in each of the stretches begins[i]..ends[i], which are not empty and in order."""
    if not len(begins):
        return np.zeros(0, dtype=np.int64)
    bounds = np.stack([begins, ends], axis=1).ravel()
    bounds = bounds[:-1] if bounds[-1] == len(flags) else bounds
    return np.add.reduceat(flags, bounds, dtype=np.int64)[::2]
