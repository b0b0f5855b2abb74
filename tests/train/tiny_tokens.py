"""Token files of made-up documents, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.data.encoding import Encoded
from train.data.tokens import PackedTokens, tokenize

END = 1  # ends a text; 0 begins one where that is another token


def packed_documents(directory: Path, documents: Sequence[Sequence[int]], *, end: int = END) -> PackedTokens:
    """Documents of these ids, special tokens included."""
    encoded = [Encoded(list(ids), None, 10) for ids in documents]
    return _packed(directory, encoded, whole=False, end=end)


def packed_examples(
    directory: Path, examples: Sequence[tuple[Sequence[int], Sequence[bool]]]
) -> PackedTokens:
    """Examples of these ids, and which of them are predicted."""
    encoded = [Encoded(list(ids), list(counted), 10) for ids, counted in examples]
    return _packed(directory, encoded, whole=True, end=END)


def _packed(directory: Path, encoded: list[Encoded], *, whole: bool, end: int) -> PackedTokens:
    directory.mkdir(parents=True, exist_ok=True)
    return tokenize(encoded, directory, largest_id=2**16 - 1, end=end, whole=whole, label="made up")
