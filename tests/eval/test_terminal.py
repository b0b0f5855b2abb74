"""A terminal shows drafts, and they leave no trace."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eval.terminal import Output, Terminal, open_output
from tests.eval.screen import Screen, ScreenFile, pictures, shown

characters = st.text("ab\n\té漢🙂\u0301\u200d\x1b\r\x9b", max_size=12)
pieces = st.lists(st.tuples(characters, st.booleans()), max_size=4)


@given(
    steps=st.lists(st.tuples(characters, pieces), max_size=8),
    width=st.integers(1, 9),
    height=st.integers(1, 4),
    emoji=st.sampled_from([1, 2]),
)
@example(steps=[("", [("abc", False)]), ("d\nb", [("", False)])], width=3, height=1, emoji=2)
@example(steps=[("", [("🙂abc", False)]), ("a", [])], width=4, height=2, emoji=1)
@example(steps=[("漢漢", [("a漢", True)])], width=2, height=2, emoji=1)
def test_drafts_leave_no_trace(
    steps: list[tuple[str, list[tuple[str, bool]]]], width: int, height: int, emoji: int
) -> None:
    file: Any = ScreenFile(Screen(width, height, emoji))
    output, screen, text = Terminal(file), file.screen, ""
    for draft, final in steps:
        before = shown(text, width, height, emoji)
        output.draft(draft)
        check_draft(screen, before, pictures(draft))
        output.write(final)
        text += pictures("".join(piece for piece, _ in final))
        after = shown(text, width, height, emoji)
        assert screen.characters == after.characters
        assert (screen.row, screen.column, screen.waiting) == (after.row, after.column, after.waiting)
        assert screen.coloured("cyan") == ""
        assert screen.colour == ""
    output.draft("ab")
    end = "\n" if file.written else ""
    output.leave()
    assert screen.characters == shown(text + end, width, height, emoji).characters


def check_draft(screen: Screen, before: Screen, draft: str) -> None:
    """The beginning of the draft's first line stands behind the cursor, and nothing else has changed."""
    assert (screen.row, screen.column, screen.waiting) == (before.row, before.column, before.waiting)
    assert len(screen.gone) == len(before.gone)
    line = screen.lines[screen.row]
    coloured = [index for index, (_, colour) in enumerate(line) if colour == "cyan"]
    assert draft.split("\n")[0].expandtabs(8).startswith(screen.coloured("cyan").rstrip()) or "\t" in draft
    assert all(index >= screen.column for index in coloured)
    for row, (now, then) in enumerate(zip(screen.lines, before.lines, strict=True)):
        kept = slice(0, screen.column if row == screen.row else screen.width)
        assert now[kept] == [(c, colour) for c, colour in now[kept] if colour != "cyan"]
        assert [c for c, _ in now[kept]] == [c for c, _ in then[kept]]


def test_a_draft_is_shown_and_what_was_accepted_keeps_a_colour() -> None:
    file: Any = ScreenFile(Screen(20, 2))
    output = Terminal(file)
    output.write([("def ", False)])
    output.draft("main(x):\n    pass")
    assert file.screen.text == "def main(x):"
    assert file.screen.coloured("cyan") == "main(x):"
    output.write([("main", True), ("(", False)])
    assert file.screen.text == "def main("
    assert file.screen.coloured("green") == "main"
    assert file.screen.coloured("cyan") == ""


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        *[("xyz", 8, "abcd"), ("xyz", 7, "abc"), ("xyz", 5, "a"), ("xyz", 4, ""), ("xyz", 3, "")],
        *[("xyxyz", 3, ""), ("xyxyxyz", 3, "a"), ("漢漢", 6, "a"), ("漢漢漢", 5, "ab"), ("xyz\n", 3, "ab")],
        *[("\tx", 13, "abc"), ("\tx", 5, ""), ("x\u0301", 20, ""), ("x\u0301\n", 20, "abcd"), ("🙂", 20, "")],
    ],
)
def test_a_draft_ends_with_the_line(text: str, width: int, shown: str) -> None:
    file: Any = ScreenFile(Screen(width, 3))
    output = Terminal(file)
    output.write([(text, False)])
    output.draft("abcd")
    assert file.screen.coloured("cyan") == shown


def test_without_a_known_size_no_draft_is_shown() -> None:
    for file in (ScreenFile(Screen(20, 2), known=False), io.StringIO()):
        unknown: Any = file
        output = Terminal(unknown)
        output.write([("a", False), ("b", True)])
        output.draft("cd")
        output.rule("1 of 2")
        written = unknown.getvalue() if isinstance(unknown, io.StringIO) else unknown.written
        assert written == "a\x1b[32mb\x1b[m── 1 of 2 \n"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TERM": "xterm"}, Terminal),
        ({"TERM": "xterm", "NO_COLOR": ""}, Terminal),
        ({"TERM": "xterm", "NO_COLOR": "1"}, Output),
        ({"TERM": "dumb"}, Output),
        ({}, Output),
    ],
)
def test_only_a_terminal_with_colours_sees_drafts(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: type[Output]
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    file: Any = ScreenFile(Screen(20, 2))
    output = open_output(file)
    assert type(output) is expected
    assert output.shows_drafts == (expected is Terminal)
    assert type(open_output(io.StringIO())) is Output


def test_what_an_encoding_lacks_is_a_question_mark() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Output(file).write([("é漢a", False)])
    assert raw.getvalue() == b"??a"
