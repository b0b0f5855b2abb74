"""The held-out documents as prompts with what follows them, for the evaluator."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Any

from layerskip_model.chat import ChatTemplate, UnusableConversation
from layerskip_model.jsonl import write_rows
from train.data.examples import Conversation, Document, Pair


def write_heldout(
    documents: Iterable[Document],
    path: Path,
    *,
    chat: ChatTemplate | None = None,
    piece_bytes: int = 1500,
    prompt_bytes: int = 250,
    max_rows: int = 2000,
) -> int:
    """Write rows {"prompt", "response", "document"}, several of a text and one of an example; return their number.

    prompt + response, joined over the rows of one text, is that text (see `tile`). An example's row says also
    whether the prompt wants the tokenizer's "special_tokens": a pair's does; a conversation's, the text before its
    last answer as `chat` writes it, holds them already. Conversations that `chat` cannot write are left out.
    Where there would be more than `max_rows` rows, evenly spaced documents are written; a first document that is
    longer than that alone is cut off. `documents` is read twice, so it may not be an iterator.
    """

    def rows_of(document: Document) -> list[dict[str, Any]]:
        return _rows(document, chat, piece_bytes, prompt_bytes)

    counts = [len(rows_of(document)) for document in documents]
    chosen = set(_evenly_spaced(counts, max_rows))
    rows = (row for index, document in enumerate(documents) if index in chosen for row in rows_of(document))
    write_rows(path, islice(rows, max_rows))
    return min(max_rows, sum(counts[index] for index in chosen))


def _rows(
    document: Document, chat: ChatTemplate | None, piece_bytes: int, prompt_bytes: int
) -> list[dict[str, Any]]:
    if isinstance(document, Conversation):
        assert chat is not None, "conversations need a template"
        try:
            pairs = [chat.last_answer(document.messages)]
        except UnusableConversation:
            return []
        flag = {"special_tokens": False}
    elif isinstance(document, Pair):
        pairs, flag = [(document.prompt, document.response)], {"special_tokens": True}
    else:
        pairs, flag = tile(document.text, piece_bytes, prompt_bytes), {}
    return [
        {"prompt": prompt, "response": response, "document": document.name, **flag}
        for prompt, response in pairs
    ]


def _evenly_spaced(counts: list[int], limit: int) -> list[int]:
    """Indices of as many evenly spaced documents as have at most `limit` rows together; at least one."""
    for number in range(min(len(counts), limit), 1, -1):
        indices = [i * len(counts) // number for i in range(number)]
        if sum(counts[i] for i in indices) <= limit:
            return indices
    return [0]


def tile(text: str, piece_bytes: int, prompt_bytes: int) -> list[tuple[str, str]]:
    """Cut a text into consecutive (prompt, response) pairs of about `piece_bytes` UTF-8 bytes each.

    Pieces begin and end with lines, and inside a line only where it is longer than `piece_bytes`. A prompt
    ends with the line that ends nearest to `prompt_bytes`; in a piece of one line it is whole words of about
    `prompt_bytes`, or all of a shorter piece. It is never only white space; a response may be empty.
    No cut is inside a character. A text of white space only has no pairs.
    """
    assert min(piece_bytes, prompt_bytes) >= 4, "a character has up to four bytes"
    if not text.strip():
        return []
    lines = [part for line in re.findall(r"[^\n]*\n|[^\n]+", text) for part in _parts(line, piece_bytes)]
    return [_prompt_and_response(piece, prompt_bytes) for piece in _pieces(lines, piece_bytes)]


def _parts(line: str, limit: int) -> list[str]:
    """A line in parts of at most `limit` bytes."""
    parts = []
    raw = line.encode()
    begin = 0
    while begin < len(raw):
        part = raw[begin : begin + limit].decode(errors="ignore")  # less a character that `limit` cuts in two
        parts.append(part)
        begin += len(part.encode())
    return parts


def _pieces(lines: list[str], piece_bytes: int) -> list[str]:
    """Join lines to even pieces: a line belongs to the piece that its middle falls into."""
    ends = list(accumulate(len(line.encode()) for line in lines))
    number = max(1, round(ends[-1] / piece_bytes))
    middles = ((begin + end) / 2 for begin, end in zip([0, *ends], ends, strict=False))
    numbered = zip((int(middle * number / ends[-1]) for middle in middles), lines, strict=True)
    pieces: list[str] = []
    for _, group in groupby(numbered, key=lambda pair: pair[0]):
        piece = "".join(line for _, line in group)
        if pieces and not (piece.strip() and pieces[-1].strip()):
            pieces[-1] += piece  # white space alone is no piece
        else:
            pieces.append(piece)
    return pieces


def _prompt_and_response(piece: str, prompt_bytes: int) -> tuple[str, str]:
    start = len(piece) - len(piece.lstrip()) + 1  # the shortest prompt that is more than white space
    ends = [match.end() for match in re.finditer(r"\n", piece) if start <= match.end() < len(piece)]
    if ends:
        cut = min(ends, key=lambda end: abs(len(piece[:end].encode()) - prompt_bytes))
    elif len(piece.encode()) <= prompt_bytes:
        cut = len(piece)
    else:
        cut = max(start, len(_parts(piece, prompt_bytes)[0]))
        word_end = piece.rfind(" ", 0, cut)
        cut = word_end if word_end >= start else cut
    return piece[:cut], piece[cut:]
