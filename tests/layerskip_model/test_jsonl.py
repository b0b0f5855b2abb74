from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerskip_model.errors import UserError
from layerskip_model.jsonl import PromptRow, read_prompts, read_rows, write_rows


def test_rows_round_trip_and_blank_lines_keep_the_count(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": 1}, {"text": "naïve 漢\u2028 \n\x0c"}, {}]
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, rows)
    assert [row for _, row in read_rows(path)] == rows
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"b": "\\ud83d\\ude00"}')
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"b": "\U0001f600"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1]", "a JSON list"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\\ud800"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n\n" + line + b"\n")
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}:3: {reason}")
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(UserError, match=str(path)):
            list(read_rows(path))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"old": 1}])

    def broken() -> Iterator[dict[str, int]]:
        yield {"new": 1}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_rows(path, broken())
    assert [row for _, row in read_rows(path)] == [{"old": 1}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_prompts_in_every_accepted_form(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "p1", "document": "ignored"},
        {"prompt": "p2", "response": "", "source": "s"},
        {"turns": ["p3", "second"], "reference": ["r3", "r"], "category": "c", "question_id": 1},
        {"prompt": "p4", "reference": "r4"},
        {"turns": ["p5"], "reference": []},
        {"prompt": "<s>p6", "special_tokens": False},
    ]
    write_rows(path, rows)
    assert read_prompts(path) == [
        PromptRow("p1", None, "mine", 1),
        PromptRow("p2", "", "s", 2),
        PromptRow("p3", "r3", "c", 3),
        PromptRow("p4", "r4", "mine", 4),
        PromptRow("p5", None, "mine", 5),
        PromptRow("<s>p6", None, "mine", 6, special_tokens=False),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "exactly one of 'prompt' and 'turns'"),
        ({"prompt": "x", "turns": ["x"]}, "exactly one of 'prompt' and 'turns'"),
        ({"prompt": 3}, "'prompt' is 3"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"turns": []}, "'turns' is"),
        ({"turns": "x"}, "'turns' is"),
        ({"turns": [1]}, "'turns' is"),
        ({"prompt": "x", "response": 1}, "response is 1"),
        ({"prompt": "x", "reference": [1]}, "'reference' is"),
        ({"prompt": "x", "source": 1}, "source is 1"),
        ({"prompt": "x", "special_tokens": "no"}, "'special_tokens' is 'no'"),
    ],
)
def test_a_bad_prompt_row_is_named(tmp_path: Path, row: dict[str, object], reason: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n" + json.dumps(row))
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n")
    with pytest.raises(UserError, match="no rows"):
        read_prompts(path)
