"""TOPv2 (Chen et al. 2020, arXiv 2010.03546): what a user says, and its meaning as a tree of intents and slots."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_lines
from train.data.examples import MalformedRow, Pair, pair_of, text_of
from train.data.fingerprints import FileHashes
from train.data.hub import DatasetSection
from train.data.local import FileCursor, FilePatterns, files_content, matching_files
from train.data.streams import Cursor

UTTERANCE, PARSE = "utterance", "semantic_parse"


class TopV2Source(DatasetSection):
    """TOPv2 as prompts with responses: tab-separated files as published, or a data set with their columns.

    The prompt is the utterance and a line break. The response is the semantic parse as it stands in the data
    (`form: parse`), or the same tree as JSON (`form: json`): {"intent": "GET_WEATHER", "slots": [{"name": "LOCATION",
    "value": "Paris"}]}. A slot's value is its words, or the intent within it, or a list of both where it holds
    several; an intent's own words, which are in the prompt, are left out.
    """

    kind: Literal["topv2"]
    files: FilePatterns | None = Field(
        None,
        description="Tab-separated files whose first line names the columns utterance and semantic_parse.",
    )
    name: str | None = Field(None, min_length=1, description="Instead: a data set such as WillHeld/top_v2.")
    form: Literal["parse", "json"] = Field("parse", description="How the response is written.")

    @model_validator(mode="after")
    def _files_or_name(self) -> Self:
        if (self.files is None) == (self.name is None):
            raise ValueError("files: give exactly one of 'files' and 'name'")
        if self.files is not None:
            for key in sorted({"config", "split", "revision"} & self.model_fields_set):
                raise ValueError(f"{key}: belongs to 'name', and the data is in 'files'; leave it out")
        return self

    @property
    def label(self) -> str:
        """Its files, or name and split."""
        return f"files {self.files}" if self.files is not None else f"'{self.name}[{self.split}]'"

    @property
    def whole(self) -> bool:
        """True: they are pairs."""
        return True

    def cursor(self, state: dict[str, Any] | None) -> Cursor:
        """The raw rows: a dict of columns each, or names of columns and a line."""
        if self.files is not None:
            return FileCursor(matching_files(self.files), _tab_separated, state)
        assert self.name is not None
        return self.rows_of(self.name, state)

    def content(self, hashes: FileHashes) -> str:
        """A hash over the files, or the data set's own fingerprint."""
        if self.files is not None:
            return files_content(matching_files(self.files), hashes)
        assert self.name is not None
        return self.content_of(self.name)

    def document(self, name: str, row: Any) -> Pair:
        """One utterance with its parse. Raises MalformedRow."""
        columns = row if isinstance(row, dict) else _columns(row[0], row[1], name)
        utterance, parse = (text_of(columns, key, name, "name") for key in (UTTERANCE, PARSE))
        if self.form == "json":
            try:
                parse = json.dumps(as_json(parse_tree(parse)), ensure_ascii=False)
            except ValueError as error:
                raise MalformedRow(f"{name}: {PARSE} {error}; mend or remove the row") from error
        return pair_of(prompt(utterance), parse.strip(), name)


def prompt(utterance: str) -> str:
    """What the model is given: one utterance, and a line break after which the answer begins."""
    return utterance.strip() + "\n"


def _tab_separated(path: str, name: str, start: int) -> Iterator[tuple[str, tuple[list[str], bytes]]]:
    """Lines after the one that names the columns, with these names."""
    header: list[str] | None = None
    for index, (number, raw) in enumerate(read_lines(path), start=-1):
        if header is None:
            header = raw.decode("utf-8-sig", errors="replace").rstrip("\r\n").split("\t")
            if not {UTTERANCE, PARSE} <= set(header):
                raise UserError(
                    f"{name}: its first line names no columns '{UTTERANCE}' and '{PARSE}' but {header}; "
                    "give TOPv2's tab-separated files"
                )
        elif index >= start:
            yield f"{name}:{number}", (header, raw)


def _columns(header: list[str], raw: bytes, name: str) -> dict[str, str]:
    try:
        cells = raw.decode().rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise MalformedRow(f"{name}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    if len(cells) != len(header):
        raise MalformedRow(f"{name}: {len(cells)} columns, but the first line names {len(header)}")
    return dict(zip(header, cells, strict=True))


@dataclass
class Node:
    """An intent ("IN") or a slot ("SL"), with the words and nodes in it in their order."""

    kind: str
    name: str
    children: list[Node | str] = field(default_factory=list)


def parse_tree(text: str) -> Node:
    """The tree of `[IN:GET_WEATHER weather in [SL:LOCATION Paris ] ]`; the parts are separated by white space.

    Raises ValueError, a phrase that says what is wrong, where brackets do not match, where the outermost node is
    no intent, and where an intent stands in an intent or a slot in a slot.
    """
    root: Node | None = None
    open_nodes: list[Node] = []
    for word in text.split():
        if root is not None and not open_nodes:
            raise ValueError(f"goes on after its end with '{word}'")
        opening = re.fullmatch(r"\[(IN|SL):(\w+)", word)
        if opening:
            node = Node(opening[1], opening[2])
            if (open_nodes[-1].kind if open_nodes else "SL") == node.kind:
                place = f"directly in '{open_nodes[-1].name}'" if open_nodes else "outermost"
                raise ValueError(
                    f"has '{word}' {place}; intents and slots must alternate, an intent outermost"
                )
            if open_nodes:
                open_nodes[-1].children.append(node)
            root = root or node
            open_nodes.append(node)
        elif not open_nodes:
            raise ValueError(f"begins with '{word}' instead of '[IN:NAME'")
        elif word == "]":
            open_nodes.pop()
        else:
            open_nodes[-1].children.append(word)
    if root is None or open_nodes:
        raise ValueError(f"lacks {len(open_nodes)} closing brackets" if root else "is empty")
    return root


def as_json(node: Node) -> dict[str, Any]:
    """An intent's tree as it is written in JSON (see `TopV2Source`)."""
    slots = [child for child in node.children if isinstance(child, Node)]
    return {"intent": node.name, "slots": [{"name": slot.name, "value": _value(slot)} for slot in slots]}


def _value(slot: Node) -> Any:
    parts: list[Any] = []
    for child in slot.children:
        if isinstance(child, Node):
            parts.append(as_json(child))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += f" {child}"
        else:
            parts.append(child)
    return "" if not parts else parts[0] if len(parts) == 1 else parts
