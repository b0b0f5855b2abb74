"""Data sets by name, through the datasets library: from the hub, or from a folder of data files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import one_line
from train.data.fingerprints import FileHashes
from train.data.row_forms import RowForm
from train.data.streams import SourceSection


class HubCursor:
    """The rows of a data set's split from row number `row` (of 0) on, on disk (`dataset`) or as a stream.

    A stream's own state, which says which file it was reading, saves reading again what came before.
    """

    def __init__(self, label: str, dataset: Any, streaming: bool, state: dict[str, Any] | None) -> None:
        self.label, self.dataset, self.streaming = label, dataset, streaming
        self.row = state["row"] if state is not None else 0
        self._stream_state = state["stream"] if state is not None else None
        if not streaming:
            dataset = dataset.select(range(self.row, len(dataset)))
        elif self._stream_state is not None:
            dataset.load_state_dict(self._stream_state)
        self._rows: Iterator[dict[str, Any]] = iter(dataset)

    def __next__(self) -> tuple[str, dict[str, Any]]:
        row = next(self._rows)
        self.row += 1
        if self.streaming:
            self._stream_state = self.dataset.state_dict()  # after an error it may be that of a later row
        return f"{self.label}:{self.row}", row

    def state(self) -> dict[str, Any]:
        """Where the next row is; for JSON."""
        return {"row": self.row, "stream": self._stream_state}


class DatasetSection(SourceSection):
    """Base of the sources that can name a data set of the hub."""

    config: str | None = Field(None, description="The data set's configuration; default: its only one.")
    split: str = Field("train", min_length=1, description="The data set's split.")
    revision: str | None = Field(None, description="A branch, tag or commit of the data set; default: main.")

    def rows_of(self, name: str, state: dict[str, Any] | None) -> HubCursor:
        """The rows of the data set `name`. Raises UserError where it cannot be reached or has no such split."""
        dataset = self._load("load_dataset", name, split=self.split, streaming=self.streaming)
        return HubCursor(f"{name}[{self.split}]", dataset, self.streaming, state)

    def content_of(self, name: str) -> str:
        """What the data set `name` says of its own content, without reading it: it knows its files' revisions."""
        builder = self._load("load_dataset_builder", name)
        return f"{name} {builder.config_id} {builder.hash}"

    def _load(self, function: str, name: str, **settings: Any) -> Any:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"data source '{name}' is read by the datasets library; pip install datasets"
            ) from None
        try:
            return getattr(datasets, function)(name, self.config, revision=self.revision, **settings)
        except Exception as error:  # it raises whatever the hub, the network and its parsers raise
            raise UserError(
                f"data source '{name}' (config {self.config}, split {self.split}) cannot be opened: {one_line(error)}; "
                "check name, config, split, connection and HF_HUB_OFFLINE"
            ) from error


class HubSource(RowForm, DatasetSection):
    """A data set of the Hugging Face hub, or a folder of data files that the datasets library can read."""

    kind: Literal["hub"]
    name: str = Field(
        min_length=1, description="The data set, such as HuggingFaceFW/fineweb-edu, or a folder."
    )

    @property
    def label(self) -> str:
        """Name and split."""
        return f"'{self.name}[{self.split}]'"

    def cursor(self, state: dict[str, Any] | None) -> HubCursor:
        """The rows, named NAME[SPLIT]:ROW from 1 on. Raises UserError where a field that is needed is no column."""
        cursor = self.rows_of(self.name, state)
        present = cursor.dataset.column_names  # None for a stream that does not know
        for column, setting in self.columns.items():
            if present is not None and column not in present:
                raise UserError(
                    f"data source {self.label}: no column '{column}'; it has {sorted(present)}: "
                    f"set '{setting}' to one"
                )
        return cursor

    def content(self, hashes: FileHashes) -> str:
        """The data set's own fingerprint."""
        return self.content_of(self.name)
