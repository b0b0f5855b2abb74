"""Where generated text is printed: a file, a pipe, or a terminal that shows drafts before they are verified.

A draft is written beside the cursor, within its line, and the cursor goes back to where it was: whatever comes
next replaces it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TextIO

from rich.cells import get_character_cell_size

Piece = tuple[str, bool]  # text, and whether it was drafted

DRAFTED, ACCEPTED, PLAIN = "\x1b[36m", "\x1b[32m", "\x1b[m"  # cyan, green
SAVE, RESTORE, ERASE = "\x1b7", "\x1b8", "\x1b[J"  # the cursor; all that stands after it
TAB = 8
JOINING = "\U0001f000"  # from here on there are emoji, which some terminals join with their neighbours
# Characters that would steer a terminal, and the pictures of them.
STEERING = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
STEERING |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Output:
    """Where text goes: as it comes, and nothing else."""

    shows_drafts = False

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self._begun = False

    def write(self, pieces: Sequence[Piece]) -> None:
        """Append text and let it be seen."""
        self._put("".join(text for text, _ in pieces))

    def draft(self, text: str) -> None:
        """Show what may come next, until the next `write`."""

    def rule(self, title: str) -> None:
        """A line that says what follows."""
        self._put(f"-- {title} --\n")

    def leave(self) -> None:
        """Leave a text that was cut short as it is, and on a terminal its line."""
        if self._begun and self.file.isatty():
            self._put("\n")

    def _put(self, text: str) -> None:
        if text:
            self._begun = True
            encoding = self.file.encoding or "utf-8"
            self.file.write(text.encode(encoding, "replace").decode(encoding))
            self.file.flush()


class Terminal(Output):
    """A terminal with colours, on which drafts appear and are replaced.

    Each write leaves it in its plain colour. A draft is cut where its line ends, or the terminal's: then it
    neither wraps nor scrolls, and the saved cursor is still the end of the text.
    """

    shows_drafts = True

    def __init__(self, file: TextIO) -> None:
        super().__init__(file)
        self._column: int | None = 0  # cells before the cursor; None: not known for certain
        self._drafted = False

    def write(self, pieces: Sequence[Piece]) -> None:
        """Replace the draft. What was drafted and accepted has a colour of its own."""
        shown = ERASE if self._drafted else ""
        self._drafted = False
        width = self._width()
        for text, accepted in pieces:
            text = text.translate(STEERING)
            for character in text:
                self._column = column_after(self._column, character, width)
            shown += f"{ACCEPTED}{text}{PLAIN}" if accepted and text else text
        self._put(shown)

    def draft(self, text: str) -> None:
        """Show its beginning, as far as the line goes."""
        beginning = self._fitting(text)
        if beginning:
            self._drafted = True
            self._put(f"{SAVE}{DRAFTED}{beginning}{PLAIN}{RESTORE}")

    def rule(self, title: str) -> None:
        """A line across the terminal."""
        line = f"── {title} "
        self.write([(line.ljust(self._width(), "─")[: self._width() or None] + "\n", False)])

    def leave(self) -> None:
        """Take the draft away, too, and set the plain colour: a write may have been cut short."""
        if self._begun:
            self._put(PLAIN + (ERASE if self._drafted else ""))
        self._drafted = False
        super().leave()

    def _fitting(self, text: str) -> str:
        """The beginning of a text that fits into the line, but for the last cell: some terminals wrap there."""
        width, column = self._width(), self._column
        for index, character in enumerate(text):
            after = column_after(column, character, width)
            if column is None or after is None or not column < after < width:  # not smaller: no new line
                return text[:index]
            column = after
        return text

    def _width(self) -> int:
        """Cells of a line now; 0 where that is not known."""
        try:
            return os.get_terminal_size(self.file.fileno()).columns
        except (OSError, ValueError):
            return 0


def column_after(column: int | None, character: str, width: int) -> int | None:
    """Where a terminal's cursor stands after a character: cells before it, or None if terminals differ.

    A full line is `width`: the cursor waits there and wraps with the next character.
    """
    if character == "\n":
        return 0
    if column is None or width < 1:
        return None
    if character == "\t":
        return min(column // TAB * TAB + TAB, width - 1)
    cells = get_character_cell_size(character)
    if cells < 1 or character >= JOINING:
        return None
    return cells if column + cells > width else column + cells


def open_output(file: TextIO) -> Output:
    """A terminal, unless it cannot show colours or the user wants none (https://no-color.org)."""
    able = file.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return Terminal(file) if able and not os.environ.get("NO_COLOR") else Output(file)
