"""Rows as the micro-batches of each optimizer step, on each rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from layerskip_model.token_loss import IGNORE_INDEX
from train.data.mixing import RowOrder
from train.data.packing import Rows

Batch = dict[str, Tensor]


class Batches(Protocol):
    """One rank's micro-batches: iterating yields a list of them an optimizer step.

    `state` is what it takes to go on after the step that was yielded last, on the main process; None where
    that follows from the number of the step.
    """

    def __iter__(self) -> Iterator[list[Batch]]: ...

    def state(self) -> dict[str, Tensor | int | str] | None: ...


@dataclass(frozen=True)
class StepBatches:
    """Micro-batches of the optimizer steps start..stop-1 of rows that are at hand.

    `sequences` is the size of the global batch, `micro` the most rows of a micro-batch. A micro-batch's "row"
    is the index within the global batch. See `RowOrder`, `cut_for_rank` and `collate`.
    """

    dataset: Rows
    order: RowOrder
    sequences: int
    micro: int
    start: int
    stop: int
    rank: int = 0
    world: int = 1

    def __iter__(self) -> Iterator[list[Batch]]:
        parts = cut_for_rank(self.sequences, self.micro, self.rank, self.world)
        for step in range(self.start, self.stop):
            rows = self.order(np.arange(step * self.sequences, (step + 1) * self.sequences)).tolist()
            yield [collate(self.dataset, rows, indices) for indices in parts]

    def state(self) -> None:
        return None


def cut_for_rank(num_rows: int, micro: int, rank: int, world: int) -> list[list[int]]:
    """One rank's micro-batches of a batch, as indices within that batch.

    The batch is cut into `world` contiguous parts and each part into even micro-batches of at most `micro`
    rows. Neither has to divide it: every rank has the same number of micro-batches, as engines ask for, and a
    rank with too few rows for that has empty ones at its end.
    """
    part = np.array_split(np.arange(num_rows), world)[rank]
    largest_part = -(-num_rows // world)
    count = -(-largest_part // micro)
    return [indices.tolist() for indices in np.array_split(part, count)]


def collate(dataset: Rows, rows: list[int], indices: list[int]) -> Batch:
    """The micro-batch {"input_ids" [b, T], "labels" [b, T], ..., "row" [b]}: rows stacked; "row" = `indices`.

    Index i stands for dataset row rows[i]. Without indices it is the row of index 0 with every label IGNORE_INDEX.
    """
    chosen = indices or [0]
    examples = [dataset[rows[index]] for index in chosen]
    batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}  # [b, ...]
    if not indices:
        batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    return batch | {"row": torch.tensor(chosen)}  # [b]


def evaluation_batches(
    dataset: Rows, micro: int, rank: int = 0, world: int = 1, limit: int | None = None
) -> Iterator[Batch]:
    """One rank's share of all rows in their order, or of `limit` evenly spaced ones, as `collate` makes them.

    Every rank has the same number of batches; labels are IGNORE_INDEX throughout in those that fill up.
    """
    rows = evaluated_rows(len(dataset), limit)
    for indices in cut_for_rank(len(rows), micro, rank, world):
        yield collate(dataset, rows, indices)


def evaluated_rows(number: int, limit: int | None) -> list[int]:
    """All of so many rows, or `limit` evenly spaced ones."""
    chosen = min(limit or number, number)
    return [index * number // chosen for index in range(chosen)]
