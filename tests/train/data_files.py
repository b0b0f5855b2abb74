"""Small data files in every format that a source reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]


def write_jsonl(path: Path, rows: Rows) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    """Row groups of two rows."""
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_arrow(path: Path, rows: Rows, *, stream: bool = True) -> Path:
    """Record batches of two rows, in the stream format or the file format."""
    table = pa.Table.from_pylist(rows)
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def write_arrow_file(path: Path, rows: Rows) -> Path:
    """Arrow's file format."""
    return write_arrow(path, rows, stream=False)


WRITERS = {
    "jsonl": (write_jsonl, "jsonl"),
    "parquet": (write_parquet, "parquet"),
    "arrow stream": (write_arrow, "arrow"),
    "arrow file": (write_arrow_file, "arrow"),
}
