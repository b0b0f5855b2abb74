"""Where training text comes from: recipe sections that yield documents, and their split in two."""

from __future__ import annotations

import glob
import hashlib
import math
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_rows
from train.section import Section


@dataclass(frozen=True)
class Document:
    """One text. `name` is the same on every run: a relative path, or FILE:LINE."""

    name: str
    text: str


# Folders of the standard library that hold tests, somebody else's packages, or tables rather than code.
_LEFT_OUT_FOLDERS = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"]
)
# Single files that are mostly generated tables.
_LEFT_OUT_FILES = frozenset({"html/entities.py", "stringprep.py", "locale.py", "re/_casefix.py"})
_LEFT_OUT_PREFIX = "_sysconfigdata"


class StdlibSource(Section):
    """The Python standard library's own source files: about 9.5 MB of real text that every machine has.

    Tests, generated tables and installed packages are left out. The text differs between Python versions.
    """

    kind: Literal["stdlib"]

    def documents(self) -> Iterator[Document]:
        """Yield each file, in the order of their names; unreadable and empty files are passed over.

        Raises UserError where this Python has no source files.
        """
        root = Path(sysconfig.get_path("stdlib"))
        found = False
        for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
            if _is_standard_code(name):
                try:
                    text = (root / name).read_bytes().decode()
                except (OSError, UnicodeDecodeError):
                    continue
                if text.strip():
                    found = True
                    yield Document(name, text)
        if not found:
            raise UserError(f"data source 'stdlib': no source files in {root}; use kind 'text' instead")


def _is_standard_code(name: str) -> bool:
    *folders, file = name.split("/")
    generated = name in _LEFT_OUT_FILES or file.startswith(_LEFT_OUT_PREFIX)
    return not generated and _LEFT_OUT_FOLDERS.isdisjoint(folders)


FilePatterns = Annotated[
    list[str],
    Field(min_length=1, description="Paths or glob patterns ('**' goes into folders), from where you run."),
]


class TextSource(Section):
    """Text files; each file is one document."""

    kind: Literal["text"]
    files: FilePatterns

    def documents(self) -> Iterator[Document]:
        """Yield each file that is not empty. Raises UserError as `matching_files`, or if all are empty."""
        found = False
        for path in matching_files(self.files):
            text = _read_text(path)
            if text.strip():
                found = True
                yield Document(Path(path).as_posix(), text)
        if not found:
            raise UserError(f"data source files {self.files}: every document is empty; give files with text")


class JsonlSource(Section):
    """Files of JSON lines; one string field of each row is one document."""

    kind: Literal["jsonl"]
    files: FilePatterns
    field: str = Field(default="text", description="The key of each row that holds the text.")

    def documents(self) -> Iterator[Document]:
        """Yield each row's text that is not empty.

        Raises UserError as `matching_files`, "FILE:LINE: ..." for a row without the field or with something
        other than a string in it, and if all texts are empty.
        """
        found = False
        for path in matching_files(self.files):
            for line, row in read_rows(path):
                name = f"{Path(path).as_posix()}:{line}"
                text = self._text_of(row, name)
                if text.strip():
                    found = True
                    yield Document(name, text)
        if not found:
            raise UserError(f"data source files {self.files}: every document is empty; give rows with text")

    def _text_of(self, row: dict[str, Any], name: str) -> str:
        if self.field not in row:
            raise UserError(f"{name}: no field '{self.field}'; the row has {sorted(row)}: set 'field' to one")
        text = row[self.field]
        if not isinstance(text, str):
            raise UserError(f"{name}: field '{self.field}' is {text!r:.40}; it must be a string")
        return text


def matching_files(patterns: list[str]) -> list[str]:
    """The files that the patterns match, each once, sorted by name.

    Raises UserError naming a pattern that matches no file.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        files = [os.path.normpath(path) for path in matches if os.path.isfile(path)]
        if not files:
            raise UserError(f"data source '{pattern}' matches no file in {os.getcwd()}; correct the pattern")
        found.update(files)
    return sorted(found)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct 'files'") from error


Source = Annotated[StdlibSource | TextSource | JsonlSource, Field(discriminator="kind")]
Sources = Annotated[list[Source], Field(min_length=1)]


def _heldout_form(value: object) -> str:
    return "sources" if isinstance(value, list) else "fraction"


class DataConfig(Section):
    """What is trained on and what is held out to measure on."""

    train: Sources = Field(description="Sources of training documents, one after the other.")
    heldout: Annotated[
        Annotated[float, Field(gt=0, lt=0.5), Tag("fraction")] | Annotated[Sources, Tag("sources")],
        Discriminator(_heldout_form),
    ] = Field(
        default=0.05,
        description="The share of the training sources' documents that is held out instead of trained on "
        "(chosen by a hash of name and content, whatever their order), or sources of its own.",
    )


@dataclass(frozen=True)
class DocumentSet:
    """Documents of several sources that pass a test; may be read again and again, never all in memory."""

    sources: tuple[Source, ...]
    keep: Callable[[Document], bool]

    def __iter__(self) -> Iterator[Document]:
        for source in self.sources:
            yield from filter(self.keep, source.documents())


def split_score(document: Document) -> float:
    """A number in [0, 1) that depends on the document's name and text alone, evenly spread."""
    digest = hashlib.sha256(document.name.encode() + b"\0" + document.text.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_documents(config: DataConfig) -> tuple[DocumentSet, DocumentSet]:
    """The training documents and the held-out documents of a recipe.

    With a fraction f, documents with `split_score` < f are held out; where there is none, the one with the
    lowest score.
    Raises UserError if the sources are unusable or a single document would have to be on both sides.
    """
    training = tuple(config.train)
    if isinstance(config.heldout, list):
        return DocumentSet(training, lambda _: True), DocumentSet(tuple(config.heldout), lambda _: True)
    scores = [split_score(document) for source in training for document in source.documents()]
    limit = max(config.heldout, math.nextafter(min(scores), 1.0))
    if max(scores) < limit:
        raise UserError(
            f"data.heldout={config.heldout}: no training document is left of {len(scores)}; "
            "give more documents or sources of their own to 'heldout'"
        )
    return (
        DocumentSet(training, lambda document: split_score(document) >= limit),
        DocumentSet(training, lambda document: split_score(document) < limit),
    )
