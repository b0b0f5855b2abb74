"""A task with one right answer, made of real code that every machine has: what a function's signature says, as JSON."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from train.data.examples import Document, pair_of
from train.data.local import LocalSource, StdlibSource

LONGEST = 200  # characters of a signature; the few that are longer are left out
Signature = tuple[str, str]
"""The source text of a function's head, and the JSON of what it says."""


class SignaturesSource(LocalSource):
    """Functions of the Python standard library as pairs: the head of a definition, and what it says as JSON.

    `def get(self, key, default=None):` has the answer {"name": "get", "parameters": ["self", "key", "default"],
    "defaults": {"default": "None"}}. Functions with the same head are the same document.
    """

    kind: Literal["signatures"]

    @property
    def label(self) -> str:
        """Its kind."""
        return "'signatures'"

    @property
    def whole(self) -> bool:
        """True: they are pairs."""
        return True

    def paths(self) -> dict[str, str]:
        """The standard library's files. Raises UserError where this Python has no source files."""
        return StdlibSource(kind="stdlib").paths()

    def read(self, path: str, name: str, start: int) -> Iterator[tuple[str, Signature]]:
        """The file's functions, named by their heads: equal ones are then held out together, or not at all."""
        for index, signature in enumerate(signatures(Path(path).read_bytes())):
            if index >= start:
                yield signature[0], signature

    def document(self, name: str, row: Signature) -> Document:
        """A signature's text and a line break; its parts."""
        return pair_of(row[0] + "\n", row[1], name)


def signatures(source: bytes) -> Iterator[Signature]:
    """The functions of a Python file whose head is on one line, in the order of the text; none if it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.decode().splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            head = lines[node.lineno - 1].strip()
            if head.endswith(":") and len(head) <= LONGEST and node.body[0].lineno > node.lineno:
                yield head, json.dumps(parts(node, lines[node.lineno - 1]), ensure_ascii=False)


def parts(function: ast.FunctionDef | ast.AsyncFunctionDef, line: str) -> dict[str, object]:
    """What a signature on one line says: name, parameters in order (stars included), defaults as they are written."""
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    names = [one.arg for one in positional]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [one.arg for one in given.kwonlyargs]
    names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    pairs = list(zip(positional[len(positional) - len(given.defaults) :], given.defaults, strict=True))
    pairs += [
        (one, default)
        for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        if default is not None
    ]
    raw = line.encode()  # ast counts in bytes
    defaults = {one.arg: raw[value.col_offset : value.end_col_offset].decode() for one, value in pairs}
    return {"name": function.name, "parameters": names, "defaults": defaults}
