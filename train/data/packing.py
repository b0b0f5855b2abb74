"""Documents as one stream of tokens on disk, windows of it as rows, rows as the batches of each step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerskip_model.errors import UserError
from layerskip_model.token_loss import IGNORE_INDEX
from train.data.sources import Document

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1000, 2_000_000  # of one call of the tokenizer
_QUIET_SECONDS = 3.0  # shorter work shows no progress bar


@dataclass(frozen=True)
class PackedTokens:
    """A file that holds the stream `[eos] document [eos] document ...` of token ids, and nothing else.

    `bytes` counts the documents' UTF-8 bytes, so bits per byte = nats / ln 2 / bytes for the whole stream.
    The counts stand in a file beside it, its name with `.json` added.
    """

    path: Path
    dtype: str  # uint16 or uint32
    tokens: int
    documents: int
    bytes: int

    def array(self) -> NDArray[np.unsignedinteger]:
        """The stream, read from the file as needed. # [tokens]"""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.tokens,))

    @classmethod
    def open(cls, path: Path) -> PackedTokens:
        """Open a finished stream. Raises OSError or ValueError if its two files are missing or disagree."""
        packed = cls(path=path, **json.loads(_counts_path(path).read_text()))
        if path.stat().st_size != packed.tokens * np.dtype(packed.dtype).itemsize:
            raise ValueError(f"{path} does not hold the {packed.tokens} tokens of {_counts_path(path)}")
        return packed


def _counts_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, path: Path, total: int | None = None
) -> PackedTokens:
    """Write `[eos] document [eos] document ...` to `path`; both files appear whole or not at all.

    Every document's first token is predicted from the eos before it. `total`, the number of documents, is for
    the progress bar on standard error, which appears after a few seconds; call this on one process only.
    """
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    num_tokens = num_documents = num_bytes = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file, slow_progress(f"tokenizing {path.stem}", total) as advance:
            for texts in _text_batches(documents):
                for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                    file.write(np.array([tokenizer.eos_token_id, *ids], dtype=dtype).tobytes())
                    num_tokens += 1 + len(ids)
                num_documents += len(texts)
                num_bytes += sum(len(text.encode()) for text in texts)
                advance(len(texts))
        packed = PackedTokens(path, dtype.name, num_tokens, num_documents, num_bytes)
        _replace(temporary, packed)
    finally:
        temporary.unlink(missing_ok=True)
    return packed


def _replace(temporary: Path, packed: PackedTokens) -> None:
    # Without its counts a stream does not open, so no moment shows new tokens with old counts.
    counts = _counts_path(packed.path)
    counts.unlink(missing_ok=True)
    os.replace(temporary, packed.path)
    temporary.write_text(json.dumps({k: v for k, v in asdict(packed).items() if k != "path"}))
    os.replace(temporary, counts)


def _text_batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        if len(texts) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


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


class Rows(Protocol):
    """What batches are made of: rows of tensors by index. Each has `labels` and the same keys and shapes."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Tensor]: ...


class PackedDataset:
    """Windows of `length` inputs, one after the other, in which every token but the first is predicted once.

    Row i is {"input_ids", "labels"}, both int64 [length], from tokens[i * length : i * length + length + 1]:
    labels[t] is the token after input_ids[t]. The short window at the end is dropped, or with `keep_last`
    filled up with labels IGNORE_INDEX. Raises UserError if there is no row.
    """

    def __init__(self, packed: PackedTokens, length: int, *, keep_last: bool = False) -> None:
        self.tokens = packed.array()  # [tokens]
        self.length = length
        predicted = packed.tokens - 1
        self.num_rows = -(-predicted // length) if keep_last else predicted // length
        if self.num_rows < 1:
            needed = 2 if keep_last else length + 1
            raise UserError(
                f"{packed.path}: {packed.tokens} tokens from {packed.documents} documents, but one row of "
                f"batch.length={length} needs {needed}; give more text or a smaller length"
            )

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        window = self.tokens[row * self.length : (row + 1) * self.length + 1].astype(np.int64)
        missing = self.length + 1 - len(window)
        inputs = np.pad(window[:-1], (0, missing), constant_values=self.tokens[0])
        labels = np.pad(window[1:], (0, missing), constant_values=IGNORE_INDEX)
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}


def rows_of_step(step: int, batch_size: int, num_rows: int, seed: int) -> list[int]:
    """The `batch_size` dataset rows of optimizer step `step` (from 0), a pure function of its arguments.

    The rows of all steps are one sequence: a permutation of range(num_rows) for each epoch, drawn from
    (seed, epoch), end to end; a batch may straddle two epochs. `seed` is not negative.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_epoch_order(seed, p // num_rows, num_rows)[p % num_rows]) for p in positions]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def cut_for_rank(num_rows: int, micro: int, rank: int, world: int) -> list[list[int]]:
    """One rank's micro-batches of a batch, as indices within that batch.

    The batch is cut into `world` contiguous parts and each part into even micro-batches of at most `micro`
    rows. Every rank has the same number of them; a rank with too few rows for that has empty ones at its end.
    """
    part = np.array_split(np.arange(num_rows), world)[rank]
    largest_part = -(-num_rows // world)
    count = -(-largest_part // micro)
    return [indices.tolist() for indices in np.array_split(part, count)]


def collate(dataset: Rows, rows: list[int], indices: list[int]) -> dict[str, Tensor]:
    """The micro-batch {"input_ids" [b, T], "labels" [b, T], ..., "row" [b]}: rows stacked; "row" = `indices`.

    Index i stands for dataset row rows[i]. Without indices it is the row of index 0 with every label IGNORE_INDEX.
    """
    chosen = indices or [0]
    examples = [dataset[rows[index]] for index in chosen]
    batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}  # [b, ...]
    if not indices:
        batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    return batch | {"row": torch.tensor(chosen)}  # [b]


@dataclass(frozen=True)
class StepBatches:
    """One rank's micro-batches of the optimizer steps start..stop-1: iterating yields a list a step.

    `sequences` is the size of the global batch, `micro` the most rows of a micro-batch. A micro-batch's "row"
    is the index within the global batch. See `rows_of_step`, `cut_for_rank` and `collate`.
    """

    dataset: Rows
    sequences: int
    micro: int
    seed: int
    start: int
    stop: int
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        parts = cut_for_rank(self.sequences, self.micro, self.rank, self.world)
        for step in range(self.start, self.stop):
            rows = rows_of_step(step, self.sequences, len(self.dataset), self.seed)
            yield [collate(self.dataset, rows, indices) for indices in parts]


def evaluation_batches(
    dataset: Rows, micro: int, rank: int = 0, world: int = 1, limit: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """One rank's share of all rows in their order, or of `limit` evenly spaced ones, as `collate` makes them.

    Every rank has the same number of batches; labels are IGNORE_INDEX throughout in those that fill up.
    """
    number = min(limit or len(dataset), len(dataset))
    rows = [index * len(dataset) // number for index in range(number)]
    for indices in cut_for_rank(number, micro, rank, world):
        yield collate(dataset, rows, indices)
