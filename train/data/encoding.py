"""What a document becomes: token ids, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from train.data.sources import Document


@dataclass(frozen=True)
class Encoded:
    """One document or example, its special tokens included.

    `counted[i]` says whether ids[i] is to be predicted, None that all are. The first id is never predicted
    where documents are kept apart: nothing stands before it. `bytes` are the UTF-8 bytes of the predicted text.
    """

    ids: list[int]
    counted: list[bool] | None
    bytes: int


class Encoder(Protocol):
    """Tokenises what a source yields, in order, many documents at a time."""

    def __call__(self, documents: Iterable[Document]) -> Iterator[Encoded]: ...
