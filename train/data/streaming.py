"""Batches from streams: one process reads, tokenises and packs ahead of training, and hands out the rows."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from layerskip_model.errors import UserError
from train.data.batches import Batch, collate, cut_for_rank
from train.data.examples import Tolerance
from train.data.mixing import EpochOrder, SourceOrder
from train.data.packing import Rows
from train.data.stream_rows import Row, SourceRows, StreamState
from train.data.streams import SourceLost

_STEPS_AHEAD = 4
Snapshot = Callable[[], StreamState]


class RowSource(Protocol):
    """Where the n-th row of one source comes from; n is 0, 1, 2, ... in turn."""

    def row(self, n: int) -> Row: ...


@dataclass(frozen=True)
class StoredRows:
    """Rows on disk, epoch after epoch, each in another order."""

    rows: Rows
    order: EpochOrder

    def row(self, n: int) -> Row:
        chosen = self.rows[int(self.order(np.array([n]))[0])]
        return {key: values.numpy().astype(np.int32) for key, values in chosen.items()}


class StreamedRows:
    """Rows of a stream, which come one after the other."""

    def __init__(self, rows: SourceRows) -> None:
        self.rows = rows

    def row(self, n: int) -> Row:
        assert n == self.rows.drawn, "a stream does not go back"
        return next(self.rows)


class Mixer:
    """The rows of several sources in the order of their weights, from the place of a run on that a state says."""

    def __init__(
        self,
        sources: Sequence[RowSource],
        weights: Sequence[float],
        seed: int,
        place: int,
        tolerance: Tolerance,
    ) -> None:
        self.sources = sources
        self.tolerance = tolerance
        self.order = SourceOrder(weights, seed)
        self.place = place

    def take(self, count: int) -> tuple[Row, Snapshot]:
        """The next rows of the run, stacked [count, length], and the state after them."""
        chosen = self.order(np.arange(self.place, self.place + count))
        rows = [self.sources[s].row(n) for s, n in zip(*(part.tolist() for part in chosen), strict=True)]
        self.place += count
        place, passed = self.place, json.dumps(self.tolerance.passed)
        snapshots = {
            number: source.rows.snapshot()
            for number, source in enumerate(self.sources)
            if isinstance(source, StreamedRows)
        }

        def state() -> StreamState:
            parts = {number: snapshot() for number, snapshot in snapshots.items()}
            flat = {f"{number}.{key}": value for number, part in parts.items() for key, value in part.items()}
            return {"rows": place, "passed": passed, **flat}

        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}, state


def part_of_state(state: StreamState | None, number: int) -> StreamState | None:
    """What a state of `Mixer` says of one of its sources."""
    prefix = f"{number}."
    part = {key.removeprefix(prefix): value for key, value in (state or {}).items() if key.startswith(prefix)}
    return part or None


@dataclass
class StreamBatches:
    """Micro-batches of the optimizer steps start..stop-1, of rows that the main process reads.

    `open_mixer` is called there only, before the first step. Each step's rows are sent to every rank, which
    takes its part of them as `StepBatches` does. What reading raises is raised on all ranks, once all steps
    before it are done: a UserError as what it is, anything else as a RuntimeError on the others.
    """

    open_mixer: Callable[[], Mixer]
    sequences: int
    micro: int
    start: int
    stop: int
    rank: int
    world: int
    begun: StreamState | None  # what `state` was after step start - 1
    is_stopping: Callable[[], bool] = bool  # whether to give up waiting for a source that is away
    _snapshot: Snapshot | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[list[Batch]]:
        parts = cut_for_rank(self.sequences, self.micro, self.rank, self.world)
        ahead = _Ahead(self._read) if self.rank == 0 else None
        try:
            for _ in range(self.start, self.stop):
                rows = ListedRows(self._receive(ahead))
                yield [collate(rows, list(range(self.sequences)), indices) for indices in parts]
        finally:
            if ahead is not None:
                ahead.close()

    def state(self) -> StreamState | None:
        """On the main process what it takes to go on after the step that was yielded last; elsewhere None."""
        return self._snapshot() if self._snapshot is not None else self.begun

    def _read(self) -> Iterator[tuple[Row, Snapshot]]:
        mixer = self.open_mixer()
        for _ in range(self.start, self.stop):
            yield mixer.take(self.sequences)

    def _receive(self, ahead: _Ahead | None) -> Row:
        """The next step's rows, sent by the main process."""
        message: list[Any] = [None]
        error: Exception | None = None
        if ahead is not None:
            item = ahead.next(self.is_stopping)
            if isinstance(item, Exception):
                error = item
                message[0] = (
                    item if isinstance(item, UserError) else RuntimeError(f"the main process: {item}")
                )
            else:
                message[0], self._snapshot = item
        broadcast_object_list(message)
        if isinstance(message[0], Exception):
            raise error or message[0]
        return message[0]


class ListedRows:
    """The rows of one step. {key: int32 [rows, length]} -> int64 [length] each."""

    def __init__(self, columns: Row) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {key: torch.from_numpy(values[row].astype(np.int64)) for key, values in self.columns.items()}


class _Ahead:
    """Runs an iterator in a thread, a few items ahead; what it raises is its last item."""

    def __init__(self, read: Callable[[], Iterator[Any]]) -> None:
        self._read = read
        self._items: Queue[Any] = Queue(_STEPS_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def next(self, is_stopping: Callable[[], bool]) -> Any:
        """The next item; SourceLost where there is none yet and nobody wants to wait any longer."""
        while True:
            with suppress(Empty):
                return self._items.get(timeout=0.5)
            if is_stopping():
                return SourceLost("data.train: stopped while waiting for a source")

    def close(self) -> None:
        """Let the thread end; one that waits for a lost source is left behind."""
        self._closed.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        try:
            for item in self._read():
                if not self._put(item):
                    return
        except Exception as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            with suppress(Full):
                self._items.put(item, timeout=0.1)
                return True
        return False
