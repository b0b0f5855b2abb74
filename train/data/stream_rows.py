"""Rows made from a stream of documents: packed, shuffled within a buffer, and able to go on from a state."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerskip_model.errors import UserError
from layerskip_model.layer_dropout import uniform_hash
from train.data.encoding import Encoded, Encoder
from train.data.packing import Ints, best_fit, example_row, window_row
from train.data.tokens import counted_of

StreamState = dict[str, Tensor | int | str]
Row = dict[str, NDArray[np.int32]]  # half the size of what a step works with; there are many in a buffer

_CHUNK_DOCUMENTS, _CHUNK_CHARACTERS = 256, 2_000_000  # are read and tokenised at once


@dataclass(frozen=True)
class RowShape:
    """What rows look like: `length` inputs, documents `separate` or joined; `end` is the token that ends a text."""

    length: int
    separate: bool
    end: int


class Packer(Protocol):
    """Makes rows of documents as they come, and keeps what does not fill one yet."""

    def add(self, documents: list[Encoded]) -> list[dict[str, Ints]]: ...

    def is_empty(self) -> bool: ...

    def state(self) -> dict[str, Tensor]: ...


class WindowPacker:
    """The rows of `WindowRows`: windows over documents end to end."""

    def __init__(self, shape: RowShape, state: dict[str, Tensor]) -> None:
        self.shape = shape
        self.ids: Ints = state["ids"].numpy() if state else np.zeros(0, np.int64)
        self.starts: Ints = state["starts"].numpy() if state else np.zeros(0, np.int64)

    def add(self, documents: list[Encoded]) -> list[dict[str, Ints]]:
        """The windows that are full now; the last token of one is the first of the next."""
        length = self.shape.length
        sizes = [len(self.ids), *(len(document.ids) for document in documents)]
        starts = np.concatenate([self.starts, np.cumsum(sizes)[:-1]])
        ids = np.concatenate([self.ids, *(np.array(document.ids, np.int64) for document in documents)])
        count = max(0, (len(ids) - 1) // length)
        bounds = np.searchsorted(starts, np.arange(count + 1) * length)
        rows = []
        for begin, first in zip(range(0, count * length, length), bounds[:-1].tolist(), strict=True):
            window = ids[begin : begin + length + 1]
            last = int(np.searchsorted(starts, begin + length, side="right"))
            shared_end = bool(documents[0].ids[0] == self.shape.end)
            rows.append(
                window_row(
                    window,
                    starts[first:last] - begin,
                    length,
                    separate=self.shape.separate,
                    shared_end=shared_end,
                )
            )
        self.ids, self.starts = ids[count * length :].copy(), starts[bounds[-1] :] - count * length
        return rows

    def is_empty(self) -> bool:
        """Whether no token waits for the next documents."""
        return not len(self.ids)

    def state(self) -> dict[str, Tensor]:
        return {"ids": torch.from_numpy(self.ids), "starts": torch.from_numpy(self.starts)}


class ExamplePacker:
    """Whole examples, best-fit packed as by `ExampleRows`, but only those of one chunk at a time.

    What lies in a chunk's last, least full row waits for the next chunk.
    """

    def __init__(self, shape: RowShape, state: dict[str, Tensor], name: str) -> None:
        self.shape, self.name = shape, name
        self.said = False
        self.waiting: list[tuple[Ints, NDArray[np.bool_]]] = []
        if state:
            ends = np.cumsum(state["sizes"].numpy())[:-1]
            ids, counted = (np.split(state[key].numpy(), ends) for key in ("ids", "counted"))
            self.waiting = [pair for pair in zip(ids, counted, strict=True) if len(pair[0])]

    def add(self, documents: list[Encoded]) -> list[dict[str, Ints]]:
        """All rows but the last."""
        length = self.shape.length
        for document in documents:
            ids = np.array(document.ids[: length + 1], np.int64)
            counted = counted_of(document)[: length + 1]
            if len(document.ids) > length + 1 and not self.said:
                self.said = True
                print(
                    f"{self.name}: an example is longer than batch.length={length}; such are cut at their end, "
                    "or left out where nothing to predict remains",
                    file=sys.stderr,
                )
            if counted[1:].any():
                self.waiting.append((ids, counted))
        bins = best_fit(np.array([len(ids) - 1 for ids, _ in self.waiting], dtype=np.int64), length)
        examples = [[self.waiting[index] for index in chosen] for chosen in bins]
        self.waiting = examples.pop() if examples else []
        return [example_row(chosen, length, separate=self.shape.separate) for chosen in examples]

    def is_empty(self) -> bool:
        """Whether no example waits for the next ones."""
        return not self.waiting

    def state(self) -> dict[str, Tensor]:
        empty: Any = (np.zeros(0, np.int64), np.zeros(0, bool))
        pairs = [empty, *self.waiting]
        return {
            "ids": torch.from_numpy(np.concatenate([ids for ids, _ in pairs])),
            "counted": torch.from_numpy(np.concatenate([counted for _, counted in pairs])),
            "sizes": torch.tensor([len(ids) for ids, _ in pairs]),
        }


class SourceRows:
    """Endless rows of one source: its documents again and again, shuffled within `buffer` rows.

    Each next row is a seeded choice among the `buffer` oldest that are at hand, so the rows depend on the
    source and the seeds alone. A new object with a `snapshot` goes on after the row that came before that.
    """

    def __init__(
        self,
        name: str,
        source: Any,
        encode: Encoder,
        shape: RowShape,
        *,
        buffer: int,
        seed: tuple[int, int],
        tolerance: Any,
        state: StreamState | None = None,
    ) -> None:
        self.name, self.source, self.encode, self.tolerance = name, source, encode, tolerance
        self.buffer, self.seed = buffer, seed
        state = state or {}
        left: Any = {key.removeprefix("left."): v for key, v in state.items() if key.startswith("left.")}
        self.packer: Packer = ExamplePacker(shape, left, name) if source.whole else WindowPacker(shape, left)
        self.rows = _unstacked(state)
        self.drawn = int(state.get("drawn", 0))
        self.place: str = str(state.get("place", "null"))  # of the stream, as JSON
        self.documents = source.stream(json.loads(self.place), tolerance)
        self.found = bool(state)  # a document that predicts something
        self.said_again = False

    def __next__(self) -> Row:
        while len(self.rows) < self.buffer:
            self._read_chunk()
        draw = uniform_hash(self.seed[0], self.drawn, np.array(self.seed[1], dtype=np.uint64))
        row = self.rows.pop(int(draw * self.buffer))
        self.drawn += 1
        return row

    def _read_chunk(self) -> None:
        """More documents, all of which are in rows or with the packer afterwards."""
        chunk = list(_chunk(self.documents))
        encoded = [document for document in self.encode(chunk) if len(document.ids) >= 2]
        rows = self.packer.add(encoded) if encoded else []
        self.found = self.found or bool(rows) or not self.packer.is_empty()
        self.rows += [{key: values.astype(np.int32) for key, values in row.items()} for row in rows]
        self.place = json.dumps(self.documents.state())
        if not chunk:
            self._begin_again()

    def _begin_again(self) -> None:
        if not self.found:
            raise UserError(
                f"{self.name}: all documents are shorter than two tokens, or examples without anything to predict "
                "within batch.length; give others"
            )
        if not self.said_again:
            self.said_again = True
            print(f"{self.name}: the stream is at its end and begins again", file=sys.stderr)
        self.place = "null"
        self.documents = self.source.stream(None, self.tolerance)

    def snapshot(self) -> Callable[[], StreamState]:
        """What it takes to go on from here, put together when it is called: most are not wanted."""
        return partial(_stacked, self.place, self.drawn, self.packer.state(), list(self.rows))


def _stacked(place: str, drawn: int, left: dict[str, Tensor], rows: list[Row]) -> StreamState:
    columns = {key: np.stack([row[key] for row in rows]) for key in (rows[0] if rows else {})}
    return {
        "place": place,
        "drawn": drawn,
        **{f"left.{key}": value for key, value in left.items()},
        **{f"rows.{key}": torch.from_numpy(values) for key, values in columns.items()},
    }


def _chunk(documents: Iterator[Any]) -> Iterator[Any]:
    """The next documents, at least one unless it is the end."""
    characters = number = 0
    while number < _CHUNK_DOCUMENTS and characters < _CHUNK_CHARACTERS:
        try:
            document = next(documents)
        except StopIteration:
            return
        number += 1
        characters += len(document.text)
        yield document


def _unstacked(state: StreamState) -> list[Row]:
    columns: Any = {key.removeprefix("rows."): v for key, v in state.items() if key.startswith("rows.")}
    count = len(next(iter(columns.values()))) if columns else 0
    return [{key: values[i].numpy() for key, values in columns.items()} for i in range(count)]
