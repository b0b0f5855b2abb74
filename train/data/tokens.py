"""Documents as token ids on disk, one after the other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.data.encoding import Encoded

_IDS, _STARTS, _COUNTED, _COUNTS = "ids.bin", "starts.bin", "counted.bin", "tokens.json"
_QUIET_SECONDS = 3.0  # shorter work shows no progress bar


@dataclass(frozen=True)
class PackedTokens:
    """A folder with the token ids of documents, end to end, and where each begins.

    `short` documents of fewer than two tokens are not among them: they predict nothing. `bytes` counts the
    UTF-8 bytes of the text that is predicted. `whole`: they are examples, which rows never cut in two, and a
    third file says which tokens are predicted. `shared_end`: the token that begins a document is the one that
    ends a text, so that predicting it after the document before teaches to stop.
    """

    directory: Path
    dtype: str  # uint16 or uint32
    tokens: int
    documents: int
    bytes: int
    short: int
    whole: bool
    shared_end: bool

    def ids(self) -> NDArray[np.unsignedinteger]:
        """All token ids, read from the file as needed. # [tokens]"""
        return self._mapped(_IDS, self.dtype, self.tokens)

    def starts(self) -> NDArray[np.uint64]:
        """Where each document begins in `ids`. # [documents]"""
        return self._mapped(_STARTS, "uint64", self.documents)

    def counted(self) -> NDArray[np.bool_]:
        """Which tokens of examples are predicted. # [tokens]"""
        assert self.whole, "all tokens of documents are predicted"
        return self._mapped(_COUNTED, "bool", self.tokens)

    def _mapped(self, name: str, dtype: str, length: int) -> NDArray:
        if not length:  # an empty file cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(self.directory / name, dtype=dtype, mode="r", shape=(length,))

    @classmethod
    def open(cls, directory: Path) -> PackedTokens:
        """Open a finished folder."""
        return cls(directory, **json.loads((directory / _COUNTS).read_text()))


def tokenize(
    encoded: Iterable[Encoded],
    directory: Path,
    *,
    largest_id: int,
    end: int,
    whole: bool,
    label: str,
    total: int | None = None,
) -> PackedTokens:
    """Write what an encoder gives into an existing folder.

    `end` is the id of the token that ends a text. `label` and `total`, the number of documents, are for the
    progress bar on standard error, which appears after a few seconds; call this on one process only.
    """
    dtype = np.dtype(np.uint16 if largest_id < 2**16 else np.uint32)
    tokens = documents = num_bytes = short = 0
    first: int | None = None
    with ExitStack() as stack:
        advance = stack.enter_context(slow_progress(f"tokenizing {label}", total))
        ids_file = stack.enter_context(open(directory / _IDS, "wb"))
        starts_file = stack.enter_context(open(directory / _STARTS, "wb"))
        counted_file = stack.enter_context(open(directory / _COUNTED, "wb")) if whole else None
        for document in encoded:
            advance(1)
            if len(document.ids) < 2:
                short += 1
                continue
            first = document.ids[0] if first is None else first
            ids_file.write(np.array(document.ids, dtype=dtype).tobytes())
            starts_file.write(np.array(tokens, dtype=np.uint64).tobytes())
            if counted_file is not None:
                counted_file.write(counted_of(document).tobytes())
            tokens += len(document.ids)
            documents += 1
            num_bytes += document.bytes
    packed = PackedTokens(
        directory, dtype.name, tokens, documents, num_bytes, short, whole, shared_end=first == end
    )
    values = {name: value for name, value in asdict(packed).items() if name != "directory"}
    (directory / _COUNTS).write_text(json.dumps(values))
    return packed


def counted_of(document: Encoded) -> NDArray[np.bool_]:
    """Which tokens of a document are predicted. # [tokens]"""
    if document.counted is None:
        return np.ones(len(document.ids), dtype=bool)
    assert len(document.counted) == len(document.ids), "one flag a token"
    return np.array(document.counted, dtype=bool)


@contextmanager
def slow_progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Give a function that counts what is done; a bar on standard error appears after a few seconds."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(label, total=total)
    begun = time.monotonic()

    def advance(amount: int) -> None:
        if not progress.live.is_started and time.monotonic() - begun > _QUIET_SECONDS:
            progress.start()
        progress.advance(task, amount)

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()
