"""What every source of documents can do: be read from any place on, and go on after it was lost for a while."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from pydantic import Field

from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import one_line
from train.data.examples import Document, MalformedRow, Tolerance
from train.data.fingerprints import FileHashes
from train.section import Section

# Together less than the other ranks wait for this one.
RETRY_SECONDS: tuple[float, ...] = (1.0, 5.0, 15.0, 45.0, 120.0)


class SourceLost(UserError):
    """A source that could be read and no longer can be."""


class Cursor(Protocol):
    """Goes over raw rows, each with its name, which is FILE:LINE or the like."""

    def __next__(self) -> tuple[str, Any]: ...

    def state(self) -> dict[str, Any]:
        """Where the next row is, after rows were taken without an error; for JSON."""
        ...


class SourceSection(Section):
    """Base of the sources. A row is what becomes one document or example: a file of text, a line, a table's row."""

    kind: str
    skip: int = Field(0, ge=0, description="Its first rows that are left out (held out elsewhere, say).")
    limit: int | None = Field(
        None, ge=1, description="How many rows are read after the skipped ones; default: all."
    )
    weight: float | None = Field(
        None,
        ge=0,
        description="Its share of the training rows, relative to the others'; on all sources or on none "
        "(none: every row of all of them once an epoch).",
    )
    streaming: bool = Field(
        False, description="Read while training, with nothing written to disk: for what is larger than it."
    )

    @property
    def label(self) -> str:
        """The source's name in messages."""
        raise NotImplementedError

    @property
    def whole(self) -> bool:
        """Whether its documents are examples that may not be cut over two rows of a batch."""
        return False

    def cursor(self, state: dict[str, Any] | None) -> Cursor:
        """The raw rows, from the first or from where a cursor's state says. Raises UserError if there are none."""
        raise NotImplementedError

    def document(self, name: str, row: Any) -> Document | None:
        """What a raw row is, None where it is empty. Raises MalformedRow."""
        raise NotImplementedError

    def content(self, hashes: FileHashes) -> str:
        """A text that changes with the rows. Raises UserError if there are none."""
        raise NotImplementedError

    def fingerprint(self, hashes: FileHashes | None = None) -> str:
        """A text that changes with the documents and not with what else the section says, such as the weight.

        Raises UserError where there are none.
        """
        settings = self.model_dump_json(exclude={"files", "weight", "streaming"})
        return f"{settings} {self.content(hashes or FileHashes())}"

    def documents(self, tolerance: Tolerance | None = None) -> DocumentStream:
        """All documents in order. Raises UserError where the source cannot be read or has none."""
        return DocumentStream(self, None, tolerance, RETRY_SECONDS if self.streaming else ())

    def stream(
        self,
        state: dict[str, Any] | None = None,
        tolerance: Tolerance | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> DocumentStream:
        """Documents from the first, or from where a stream's state says; it goes on after a passing loss."""
        return DocumentStream(self, state, tolerance, RETRY_SECONDS, sleep)


class DocumentStream(Iterator[Document]):
    """A source's documents in order, its malformed rows given to `tolerance` (default: the first is an error).

    When reading fails it is tried again after each of the `pauses` (seconds), from where it stopped. Raises SourceLost
    when they are used up without one more row, UserError where the source cannot be opened at first or ends
    without a document.
    """

    def __init__(
        self,
        source: SourceSection,
        state: dict[str, Any] | None,
        tolerance: Tolerance | None,
        pauses: tuple[float, ...],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._source, self._pauses, self._sleep = source, pauses, sleep
        self._tolerance = tolerance or Tolerance()
        self._rows = state["rows"] if state else 0  # taken from the cursor, the skipped ones too
        self._documents = state["documents"] if state else 0
        self._place: dict[str, Any] | None = state["cursor"] if state else None
        self._cursor: Cursor | None = None

    def __next__(self) -> Document:
        while (item := self._next_row()) is not None:
            try:
                document = self._source.document(*item)
            except MalformedRow as error:
                self._tolerance(error)
                continue
            if document is not None:
                self._documents += 1
                return document
        if not self._documents:
            raise UserError(self._why_none())
        raise StopIteration

    def state(self) -> dict[str, Any]:
        """Where the next document is; for JSON and `SourceSection.stream`."""
        place = self._cursor.state() if self._cursor is not None else self._place
        return {"rows": self._rows, "documents": self._documents, "cursor": place}

    def _next_row(self) -> tuple[str, Any] | None:
        """The next raw row that is neither skipped nor beyond the limit, None after the last."""
        failures = 0
        while True:
            try:
                return self._read_row()
            except StopIteration:
                return None
            except Exception as error:  # readers of files and of the hub raise whatever they like
                if isinstance(error, UserError) and not failures:
                    raise  # wrong from the start
                if self._cursor is not None:
                    self._place, self._cursor = self._cursor.state(), None
                if failures == len(self._pauses):
                    raise self._lost(error, attempts=failures + 1) from error
                self._say(error, failures)
                self._sleep(self._pauses[failures])
                failures += 1

    def _read_row(self) -> tuple[str, Any]:
        if self._cursor is None:
            self._cursor = self._source.cursor(self._place)
        while self._rows < self._source.skip:
            next(self._cursor)
            self._rows += 1
        if self._source.limit is not None and self._rows - self._source.skip >= self._source.limit:
            raise StopIteration
        item = next(self._cursor)
        self._rows += 1
        return item

    def _say(self, error: Exception, failures: int) -> None:
        print(
            f"data source {self._source.label}: lost after {self._rows:,} rows ({one_line(error)}); trying again "
            f"in {self._pauses[failures]:g} s ({failures + 1} of {len(self._pauses)})",
            file=sys.stderr,
        )

    def _lost(self, error: Exception, attempts: int) -> SourceLost:
        where = f"data source {self._source.label}: cannot be read after {self._rows:,} rows"
        if not self._pauses:
            return SourceLost(f"{where} ({one_line(error)}); mend or replace it")
        return SourceLost(
            f"{where} ({attempts} attempts; {one_line(error)}); bring it back and give the same command "
            "again: the run goes on from its last checkpoint"
        )

    def _why_none(self) -> str:
        source = self._source
        if source.skip and self._rows <= source.skip:
            return f"data source {source.label}: skip: {source.skip} leaves nothing of its {self._rows} rows"
        if not self._rows:
            return f"data source {source.label}: has no rows; give files with some"
        return f"data source {source.label}: every document is empty; give rows with text"
