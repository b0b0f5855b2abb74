"""JSON lines: rows in, rows out, and the prompt rows that training and evaluation both read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip_model.errors import UserError


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (1-based line number, JSON object) for every line of a file that is not blank.

    Raises UserError for a path that is no readable file, and as `parse_row`.
    """
    try:
        for number, raw in read_lines(path):
            yield number, parse_row(raw, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from error


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield (1-based line number, bytes) for every line of a file that is not blank. Raises OSError."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield number, raw


def parse_row(raw: bytes, where: str) -> dict[str, Any]:
    """A line's JSON object.

    Raises UserError "FILE:LINE: ..." (`where`) for a line that is not UTF-8 (an escaped half of a surrogate pair
    cannot be written as UTF-8 either) or not a JSON object.
    """
    try:
        row = json.loads(raw.decode("utf-8-sig"))
        if b"\\ud" in raw.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}); every line must be one JSON object") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}; every line must be one JSON object")
    return row


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; the file appears whole or not at all.

    The rows go to a temporary file beside `path`, which then takes its name. Parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class PromptRow:
    """One prompt of a prompts file.

    `response` is the text that the file gives as the answer, None if it gives none. `source` is the row's
    `source` or `category`, or else the file's name without its ending. `line` is 1-based. Without `special_tokens`
    the prompt holds its special tokens already, as a chat template wrote it, and none are added to it.
    """

    prompt: str
    response: str | None
    source: str
    line: int
    special_tokens: bool = True


def read_prompts(path: str | Path) -> list[PromptRow]:
    """Read rows with `prompt` (str) or `turns` (list of str, of which the first is the prompt).

    The answer may stand in `response` or `reference` (a str, or as in Spec-Bench a list with one str a turn),
    the origin in `source` or `category`; `special_tokens: false` says that the prompt holds them already; other
    keys are ignored.
    Raises UserError "FILE:LINE: ..." for any other row and for an empty prompt, and for a file without rows.
    """
    rows = [_prompt_row(row, f"{path}:{line}", Path(path).stem, line) for line, row in read_rows(path)]
    if not rows:
        raise UserError(f'{path}: no rows; write one JSON object a line, such as {{"prompt": "..."}}')
    return rows


def _prompt_row(row: dict[str, Any], where: str, default_source: str, line: int) -> PromptRow:
    if ("prompt" in row) == ("turns" in row):
        raise UserError(f"{where}: keys {sorted(row)}; a row needs exactly one of 'prompt' and 'turns'")
    prompt = row["prompt"] if "prompt" in row else _first_text(row, "turns", where)
    if not isinstance(prompt, str):
        raise UserError(f"{where}: 'prompt' is {prompt!r:.40}; it must be a string")
    if not prompt.strip():
        raise UserError(f"{where}: the prompt is empty; fill it in or remove the row")
    response = row.get("response")
    if response is None and row.get("reference"):
        reference = row["reference"]
        response = _first_text(row, "reference", where) if isinstance(reference, list) else reference
    if response is not None and not isinstance(response, str):
        raise UserError(f"{where}: the response is {response!r:.40}; it must be a string")
    source = row.get("source", row.get("category", default_source))
    if not isinstance(source, str):
        raise UserError(f"{where}: the source is {source!r:.40}; it must be a string")
    special_tokens = row.get("special_tokens", True)
    if not isinstance(special_tokens, bool):
        raise UserError(f"{where}: 'special_tokens' is {special_tokens!r:.40}; it must be true or false")
    return PromptRow(prompt, response, source, line, special_tokens)


def _first_text(row: dict[str, Any], key: str, where: str) -> str:
    texts = row[key]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: '{key}' is {texts!r:.40}; it must be a list of at least one string")
    return str(texts[0])
