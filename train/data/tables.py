"""Rows of parquet and arrow files, read piece by piece through pyarrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import one_line

_PIECE = 1000  # rows that are made Python objects at a time
Rows = Iterator[tuple[str, dict[str, Any]]]


def parquet_rows(path: str, name: str, start: int, columns: Mapping[str, str]) -> Rows:
    """Rows from number `start` (of 0) on, named NAME:NUMBER with numbers from 1; row groups before it are not read.

    `columns` are read, each with the recipe's key for it. Raises UserError for a file that lacks one or is damaged.
    """
    with _readable(name, "parquet"):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            _require(columns, file.schema_arrow.names, name)
            first = 0  # row of the group
            for group in range(file.num_row_groups):
                number = file.metadata.row_group(group).num_rows
                if first + number > start:
                    batches = file.iter_batches(_PIECE, row_groups=[group], columns=list(columns))
                    yield from _rows(batches, first, start, name)
                first += number


def arrow_rows(path: str, name: str, start: int, columns: Mapping[str, str]) -> Rows:
    """As `parquet_rows`, for arrow's stream format and its file format."""
    with _readable(name, "arrow"):
        import pyarrow

        with pyarrow.memory_map(path) as file:
            try:
                reader = pyarrow.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                file.seek(0)
                batches = reader = pyarrow.ipc.open_stream(file)
            _require(columns, reader.schema.names, name)
            yield from _rows((batch.select(list(columns)) for batch in batches), 0, start, name)


def _rows(batches: Iterable[Any], first: int, start: int, name: str) -> Rows:
    """The rows of pyarrow record batches, of which the first holds row `first` of the file."""
    for batch in batches:
        for offset in range(max(0, start - first), batch.num_rows, _PIECE):
            piece = batch.slice(offset, _PIECE).to_pylist()
            for number, row in enumerate(piece, start=first + offset + 1):
                yield f"{name}:{number}", row
        first += batch.num_rows


def _require(columns: Mapping[str, str], present: list[str], name: str) -> None:
    for column, setting in columns.items():
        if column not in present:
            raise UserError(
                f"{name}: no column '{column}'; the file has {sorted(present)}: set '{setting}' to one"
            )


@contextmanager
def _readable(name: str, kind: str) -> Iterator[None]:
    """Turn pyarrow's complaints about a file into the user's; losing the file itself stays an OSError."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"data source kind '{kind}' needs pyarrow; pip install pyarrow") from None
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's, not pyarrow's
        raise UserError(f"{name}: damaged, or no {kind} file ({one_line(error)}); replace it") from error
