from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.tiny_tokens import END, packed_documents, packed_examples
from train.data import tokens
from train.data.encoding import Encoded
from train.data.tokens import PackedTokens, tokenize


def test_the_files_hold_ids_starts_and_what_is_counted(tmp_path: Path) -> None:
    documents = [[0, 7, 8, END], [0, END], [0, 9, END]]
    packed = packed_documents(tmp_path / "documents", documents)
    assert packed.ids().tolist() == [0, 7, 8, END, 0, END, 0, 9, END]
    assert packed.starts().tolist() == [0, 4, 6]
    assert (packed.tokens, packed.documents, packed.bytes, packed.short) == (9, 3, 30, 0)
    assert (packed.whole, packed.shared_end) == (False, False)
    assert PackedTokens.open(tmp_path / "documents") == packed
    assert not (tmp_path / "documents" / "counted.bin").exists()

    examples = packed_examples(
        tmp_path / "examples", [([0, 5, 6], [False, False, True]), ([0, 4], [False, True])]
    )
    assert examples.counted().tolist() == [False, False, True, False, True]
    assert examples.whole
    assert PackedTokens.open(tmp_path / "examples") == examples


def test_an_example_without_flags_is_counted_whole(tmp_path: Path) -> None:
    packed = tokenize([Encoded([3, 4], None, 1)], tmp_path, largest_id=9, end=END, whole=True, label="x")
    assert packed.counted().tolist() == [True, True]


def test_documents_that_predict_nothing_are_passed_over(tmp_path: Path) -> None:
    packed = packed_documents(tmp_path / "some", [[END], [END, 5], [], [END]])
    assert (packed.ids().tolist(), packed.starts().tolist(), packed.short) == ([END, 5], [0], 3)
    assert packed.shared_end
    none = packed_documents(tmp_path / "none", [[END], []])
    assert (none.documents, none.short, none.ids().tolist(), none.starts().tolist()) == (0, 2, [], [])


@pytest.mark.parametrize(("largest", "dtype"), [(2**16 - 1, "uint16"), (2**16, "uint32")])
def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path, largest: int, dtype: str) -> None:
    packed = tokenize(
        [Encoded([0, largest], None, 1)], tmp_path, largest_id=largest, end=END, whole=False, label="x"
    )
    assert (packed.dtype, packed.ids().tolist()) == (dtype, [0, largest])


def test_what_was_not_finished_does_not_open(tmp_path: Path) -> None:
    packed_documents(tmp_path, [[END, 5]])
    counts = tmp_path / "tokens.json"
    assert json.loads(counts.read_text())["tokens"] == 2
    counts.unlink()
    with pytest.raises(OSError, match=r"tokens\.json"):
        PackedTokens.open(tmp_path)


def test_the_progress_bar_shows_only_for_slow_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, shown in ((60.0, False), (-1.0, True)):
        monkeypatch.setattr(tokens, "_QUIET_SECONDS", seconds)
        monkeypatch.setenv("FORCE_COLOR", "1")
        with tokens.slow_progress("tokenizing", 10) as advance:
            advance(3)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert bool(captured.err) == shown
