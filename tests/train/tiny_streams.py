"""Streams of made-up documents, which tests can fail, and batches of them without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from train.data.encoding import Encoded
from train.data.examples import Document, Tolerance
from train.data.stream_rows import RowShape, SourceRows, StreamState
from train.data.streaming import Mixer, StreamBatches, StreamedRows, part_of_state
from train.data.streams import SourceLost

SHAPE = RowShape(length=8, separate=True, end=1)


@dataclass
class FlakySource:
    """Document n is `[0] n n n ... [1]` of 3 to 12 tokens; `gone_after` so many it is lost for good."""

    number: int = 50
    gone_after: int | None = None
    whole: bool = False
    opened: int = 0

    def stream(self, state: dict[str, Any] | None, tolerance: Tolerance) -> FlakyStream:
        self.opened += 1
        return FlakyStream(self, state["next"] if state else 0)


class FlakyStream(Iterator[Document]):
    def __init__(self, source: FlakySource, following: int) -> None:
        self.source, self.following = source, following

    def __next__(self) -> Document:
        if self.following == self.source.gone_after:
            raise SourceLost(f"lost after {self.following} documents")
        if self.following == self.source.number:
            raise StopIteration
        self.following += 1
        return Document(f"{self.following - 1}", str(self.following - 1))

    def state(self) -> dict[str, Any]:
        return {"next": self.following}


class NumberEncoder:
    """The tokens of such documents; where they are examples, all but the first few are predicted."""

    rules = "numbers"

    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def __call__(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        for document in documents:
            ids = number_ids(int(document.text))
            counted = [i >= 2 for i in range(len(ids))] if self.whole else None
            yield Encoded(ids, counted, len(document.text))


def number_ids(number: int) -> list[int]:
    """[0] number ... [1]."""
    return [0, *[number + 2] * (1 + number * 7 % 10), 1]


def source_rows(
    source: Any, *, buffer: int = 5, seed: int = 0, state: StreamState | None = None, shape: RowShape = SHAPE
) -> SourceRows:
    """Rows of such a source."""
    return SourceRows(
        "data.train[0]",
        source,
        NumberEncoder(source.whole),
        shape,
        buffer=buffer,
        seed=(seed, 0),
        tolerance=Tolerance(),
        state=state,
    )


def new_batches(
    source: Any, *, start: int, stop: int, rank: int = 0, world: int = 1, state: StreamState | None = None
) -> StreamBatches:
    """Global batches of 5 rows, in micro-batches of at most 2."""

    def open_mixer() -> Mixer:
        rows = source_rows(source, state=part_of_state(state, 0))
        place = int(state["rows"]) if state else 0
        return Mixer([StreamedRows(rows)], [1.0], 0, place, Tolerance())

    return StreamBatches(open_mixer, 5, 2, start, stop, rank, world, state)
