"""Sources that are files on this machine: text, JSON lines, parquet, arrow, and the standard library's own code."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from layerskip_model.errors import UserError
from layerskip_model.jsonl import parse_row, read_lines
from train.data.examples import Document, MalformedRow
from train.data.fingerprints import FileHashes
from train.data.row_forms import RowForm
from train.data.streams import SourceSection
from train.data.tables import arrow_rows, parquet_rows

FilePatterns = Annotated[
    list[str],
    Field(min_length=1, description="Paths or glob patterns ('**' goes into folders), from where you run."),
]
Reader = Callable[
    [str, str, int], Iterator[tuple[str, Any]]
]  # path, its name, first row -> (row's name, row)


class FileCursor:
    """The rows of files, one file after the other. Its state is a file's name and the number of a row in it."""

    def __init__(self, files: dict[str, str], read: Reader, state: dict[str, Any] | None) -> None:
        self.files, self.read = files, read  # each file's path by its name
        self.names = list(files)
        self.file, self.row = 0, 0
        if state is not None:
            if state["file"] not in files:
                raise UserError(
                    f"{state['file']}: the data had been read up to here, and the file is gone; bring it back"
                )
            self.file, self.row = self.names.index(state["file"]), state["row"]
        self._rows: Iterator[tuple[str, Any]] | None = None

    def __next__(self) -> tuple[str, Any]:
        while True:
            if self._rows is None:
                name = self.names[self.file]
                self._rows = self.read(self.files[name], name, self.row)
            item = next(self._rows, None)
            if item is not None:
                self.row += 1
                return item
            if self.file + 1 == len(self.names):
                raise StopIteration
            self.file, self.row, self._rows = self.file + 1, 0, None

    def state(self) -> dict[str, Any]:
        """Where the next row is; for JSON."""
        return {"file": self.names[self.file], "row": self.row}


class LocalSource(SourceSection):
    """Base of the sources that read files."""

    def paths(self) -> dict[str, str]:
        """Each file's path by the name that documents' names begin with. Raises UserError if there are none."""
        raise NotImplementedError

    def read(self, path: str, name: str, start: int) -> Iterator[tuple[str, Any]]:
        """A file's raw rows from row `start` on, each with its name."""
        raise NotImplementedError

    def cursor(self, state: dict[str, Any] | None) -> FileCursor:
        """The raw rows of all files."""
        return FileCursor(self.paths(), self.read, state)

    def content(self, hashes: FileHashes) -> str:
        """A hash over the files' names and bytes."""
        return files_content(self.paths(), hashes)


def files_content(paths: dict[str, str], hashes: FileHashes) -> str:
    """A hash over files' names and bytes; their paths by name."""
    digest = hashlib.sha256()
    for name, path in paths.items():
        digest.update(f"{hashes.of(path)} {name}\n".encode())
    return digest.hexdigest()


class FilesSource(LocalSource):
    """Base of the sources whose files the recipe names."""

    files: FilePatterns

    @property
    def label(self) -> str:
        """The patterns."""
        return f"files {self.files}"

    def paths(self) -> dict[str, str]:
        """The files that match. Raises UserError as `matching_files`."""
        return matching_files(self.files)


def matching_files(patterns: list[str]) -> dict[str, str]:
    """The files that the patterns match, each once: their paths by their names, sorted.

    Raises UserError naming a pattern that matches no file.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        files = [os.path.normpath(path) for path in matches if os.path.isfile(path)]
        if not files:
            raise UserError(f"data source '{pattern}' matches no file in {os.getcwd()}; correct the pattern")
        found.update(files)
    return {Path(path).as_posix(): path for path in sorted(found)}


# Folders of the standard library that hold tests, somebody else's packages, or tables rather than code.
_LEFT_OUT_FOLDERS = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"]
)
# Single files that are mostly generated tables.
_LEFT_OUT_FILES = frozenset({"html/entities.py", "stringprep.py", "locale.py", "re/_casefix.py"})
_LEFT_OUT_PREFIX = "_sysconfigdata"


class StdlibSource(LocalSource):
    """The Python standard library's own source files: about 9.5 MB of real text that every machine has.

    Tests, generated tables and installed packages are left out. The text differs between Python versions.
    """

    kind: Literal["stdlib"]

    @property
    def label(self) -> str:
        """Its kind."""
        return "'stdlib'"

    def paths(self) -> dict[str, str]:
        """The files, sorted by name. Raises UserError where this Python has no source files."""
        root = Path(sysconfig.get_path("stdlib"))
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
        paths = {name: str(root / name) for name in names if _is_standard_code(name)}
        if not paths:
            raise UserError(f"data source 'stdlib': no source files in {root}; use kind 'text' instead")
        return paths

    def read(self, path: str, name: str, start: int) -> Iterator[tuple[str, bytes]]:
        """The file's bytes."""
        yield from _whole_file(path, name, start)

    def document(self, name: str, row: bytes) -> Document | None:
        """The file's text; the few that are not UTF-8 are passed over."""
        try:
            text = row.decode()
        except UnicodeDecodeError:
            return None
        return Document(name, text) if text.strip() else None


def _is_standard_code(name: str) -> bool:
    *folders, file = name.split("/")
    generated = name in _LEFT_OUT_FILES or file.startswith(_LEFT_OUT_PREFIX)
    return not generated and _LEFT_OUT_FOLDERS.isdisjoint(folders)


class TextSource(FilesSource):
    """Text files; each file is one document, empty ones are passed over."""

    kind: Literal["text"]

    def read(self, path: str, name: str, start: int) -> Iterator[tuple[str, bytes]]:
        """The file's bytes."""
        yield from _whole_file(path, name, start)

    def document(self, name: str, row: bytes) -> Document | None:
        """The file's text. Raises MalformedRow where it is not UTF-8."""
        try:
            text = row.decode()
        except UnicodeDecodeError as error:
            raise MalformedRow(f"{name}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        return Document(name, text) if text.strip() else None


def _whole_file(path: str, name: str, start: int) -> Iterator[tuple[str, bytes]]:
    """A file that is one row."""
    if start == 0:
        yield name, Path(path).read_bytes()


class JsonlSource(RowForm, FilesSource):
    """Files of JSON lines; each line that is not blank is a row."""

    kind: Literal["jsonl"]

    def read(self, path: str, name: str, start: int) -> Iterator[tuple[str, bytes]]:
        """The lines as bytes, named FILE:LINE."""
        for index, (number, raw) in enumerate(read_lines(path)):
            if index >= start:
                yield f"{name}:{number}", raw

    def document(self, name: str, row: bytes) -> Document | None:
        """What a line holds. Raises MalformedRow where it is no JSON object."""
        try:
            values = parse_row(row, name)
        except UserError as error:
            raise MalformedRow(str(error)) from error
        return super().document(name, values)


class ParquetSource(RowForm, FilesSource):
    """Parquet files; only the columns that are needed are read."""

    kind: Literal["parquet"]

    def read(self, path: str, name: str, start: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows, named FILE:ROW from 1 on."""
        return parquet_rows(path, name, start, self.columns)


class ArrowSource(RowForm, FilesSource):
    """Arrow files, in the stream format in which datasets keeps its tables or in the file format."""

    kind: Literal["arrow"]

    def read(self, path: str, name: str, start: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows, named FILE:ROW from 1 on."""
        return arrow_rows(path, name, start, self.columns)
