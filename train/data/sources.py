"""The recipe's data section: sources of documents for training, and what is held out of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from layerskip_model.errors import UserError
from train.data.examples import Document, Tolerance
from train.data.hub import HubSource
from train.data.local import ArrowSource, JsonlSource, ParquetSource, StdlibSource, TextSource
from train.data.row_forms import RowForm
from train.data.signatures import SignaturesSource
from train.data.topv2 import TopV2Source
from train.section import Section

Source = Annotated[
    StdlibSource
    | TextSource
    | JsonlSource
    | ParquetSource
    | ArrowSource
    | HubSource
    | TopV2Source
    | SignaturesSource,
    Field(discriminator="kind"),
]
Sources = Annotated[list[Source], Field(min_length=1)]


def _heldout_form(value: object) -> str:
    return "sources" if isinstance(value, list) else "fraction"


class DataConfig(Section):
    """What is trained on and what is held out to measure on."""

    train: Sources = Field(description="Sources of training documents.")
    heldout: Annotated[
        Annotated[float, Field(gt=0, lt=0.5), Tag("fraction")] | Annotated[Sources, Tag("sources")],
        Discriminator(_heldout_form),
    ] = Field(
        default=0.05,
        description="The share of the training sources' documents that is held out instead of trained on "
        "(chosen by a hash of name and content, whatever their order), or sources of its own.",
    )
    documents: Literal["separate", "joined"] = Field(
        "separate",
        description="separate: positions and attention begin anew at each document, though several share a row; "
        "joined: a row is one text, whatever it is made of.",
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="A Jinja file that writes conversations as text; default: the tokenizer's own template.",
    )
    skip_malformed: int = Field(
        0,
        ge=0,
        description="How many rows that cannot be read may be passed over, in all; one more is an error "
        "that names file and line.",
    )
    shuffle_buffer: int = Field(1000, ge=1, description="Rows that a stream is shuffled within.")
    cache_dir: str | None = Field(
        None,
        min_length=1,
        description="Where tokenised data is kept by its content, for all runs; default: in the run's directory.",
    )

    @property
    def heldout_sources(self) -> list[Source]:
        """The held-out documents' own sources; none where a share of the training documents is held out."""
        return self.heldout if isinstance(self.heldout, list) else []

    @model_validator(mode="after")
    def _weights(self) -> Self:
        weights = [source.weight for source in self.train if source.weight is not None]
        if weights and len(weights) < len(self.train):
            raise ValueError(
                f"train: {len(weights)} of {len(self.train)} sources have a weight; give it to all or to none"
            )
        if weights and sum(weights) == 0:
            raise ValueError(f"train: the sources' weights {weights} sum to zero; give one that is more")
        if len(self.train) > 1 and not weights and any(source.streaming for source in self.train):
            raise ValueError("train: several sources of which one is a stream need a 'weight' each")
        for source in self.heldout_sources:
            if source.weight is not None:
                raise ValueError("heldout: held-out sources have no weight; all of them are measured on")
        return self

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if not self.heldout_sources and any(source.streaming for source in self.train):
            raise ValueError(
                "heldout: no share can be taken of a stream; give a list of sources, such as the same one with "
                "'limit: 1000' (and 'skip: 1000' under 'train')"
            )
        for source in self.heldout_sources:
            if source.streaming and source.limit is None:
                raise ValueError("heldout: a stream needs a 'limit' here, since all of it is measured on")
        return self

    @model_validator(mode="after")
    def _template(self) -> Self:
        sources = [*self.train, *self.heldout_sources]
        talks = any(isinstance(source, RowForm) and source.conversation is not None for source in sources)
        if self.chat_template is not None and not talks:
            raise ValueError("chat_template: no source has a 'conversation' that it would write")
        return self


@dataclass(frozen=True)
class DocumentSet:
    """Documents of several sources that pass a test; may be read again and again, never all in memory."""

    sources: tuple[Source, ...]
    keep: Callable[[Document], bool]
    tolerance: Tolerance = field(default_factory=Tolerance)

    def __iter__(self) -> Iterator[Document]:
        for source in self.sources:
            yield from self.of(source)

    def of(self, source: Source) -> Iterator[Document]:
        """One source's documents that pass the test."""
        return filter(self.keep, source.documents(self.tolerance))


def split_score(document: Document) -> float:
    """A number in [0, 1) that depends on the document's name and text alone, evenly spread."""
    digest = hashlib.sha256(document.name.encode() + b"\0" + document.text.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def heldout_limit(config: DataConfig, tolerance: Tolerance) -> float | None:
    """The score below which documents are held out; None where held-out documents have sources of their own.

    It is the fraction, or where no document scores less, what holds out the one with the lowest score. All
    documents are read. Raises UserError if the sources are unusable or nothing would be left to train on.
    """
    if isinstance(config.heldout, list):
        return None
    lowest, highest, number = 1.0, 0.0, 0
    for source in config.train:
        for document in source.documents(tolerance):
            score = split_score(document)
            lowest, highest, number = min(lowest, score), max(highest, score), number + 1
    limit = max(config.heldout, math.nextafter(lowest, 1.0))
    if highest < limit:
        raise UserError(
            f"data.heldout={config.heldout}: no training document is left of {number}; "
            "give more documents or sources of their own to 'heldout'"
        )
    return limit


def split_documents(
    config: DataConfig, limit: float | None, tolerance: Tolerance
) -> tuple[DocumentSet, DocumentSet]:
    """The training documents and the held-out documents of a recipe, at its `heldout_limit`.

    Malformed rows go to `tolerance`.
    """
    training = tuple(config.train)
    if limit is None:
        heldout = DocumentSet(tuple(config.heldout_sources), lambda _: True, tolerance)
        return DocumentSet(training, lambda _: True, tolerance), heldout
    return (
        DocumentSet(training, lambda document: split_score(document) >= limit, tolerance),
        DocumentSet(training, lambda document: split_score(document) < limit, tolerance),
    )
