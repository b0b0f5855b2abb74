"""A terminal on paper, which understands exactly what `eval.terminal` may say to one."""

from __future__ import annotations

import os
import pty
import re
import termios
import unicodedata
from collections.abc import Iterable
from functools import cache

CODES = re.compile("\x1b([78]|\\[J|\\[(?:3[26])?m)|(\r)|(\n)|(\t)|([^\x00-\x1f\x7f-\x9f])")
EMPTY = (" ", "")
PICTURES = "␀␁␂␃␄␅␆␇␈\t\n␋␌␍␎␏␐␑␒␓␔␕␖␗␘␙␚␛␜␝␞␟"


class Screen:
    """Cells of (character, colour), a cursor, and the lines that went out at the top.

    It wraps as xterm does: a full line holds the cursor in its last cell until the next character, and erasing
    then takes that last cell too. `emoji` is how many cells an emoji takes: terminals do not agree.
    """

    def __init__(self, width: int, height: int, emoji: int = 2) -> None:
        self.width, self.height, self.emoji = width, height, emoji
        self.gone: list[list[tuple[str, str]]] = []
        self.lines = [[EMPTY] * width for _ in range(height)]
        self.row = self.column = 0
        self.waiting = False  # the line is full
        self.colour = ""
        self.saved = (0, 0, False)

    def feed(self, text: str) -> Screen:
        """Show text. Fails for anything that the terminal should never be sent."""
        end = 0
        for found in CODES.finditer(text):
            assert found.start() == end, f"not understood: {text[end : found.start()]!r}"
            end = found.end()
            code, carriage, newline, tab, character = found.groups()
            if code:
                self._obey(code)
            elif carriage:
                self.column, self.waiting = 0, False
            elif newline:
                self._newline()
            elif tab:
                self.column = min(self.column // 8 * 8 + 8, self.width - 1)
            else:
                self._put(character)
        assert end == len(text), f"not understood: {text[end:]!r}"
        return self

    @property
    def characters(self) -> list[str]:
        """All lines, those that went out too, without colours."""
        return ["".join(character for character, _ in line) for line in self.gone + self.lines]

    @property
    def text(self) -> str:
        """What there is to read."""
        return "\n".join(line.rstrip() for line in self.characters).rstrip("\n")

    def coloured(self, colour: str) -> str:
        """All characters of a colour."""
        return "".join(c for line in self.gone + self.lines for c, its in line if its == colour)

    def _obey(self, code: str) -> None:
        if code == "7":
            self.saved = (self.row, self.column, self.waiting)
        elif code == "8":
            self.row, self.column, self.waiting = self.saved
        elif code == "[J":
            self.lines[self.row][self.column :] = [EMPTY] * (self.width - self.column)
            for row in range(self.row + 1, self.height):
                self.lines[row] = [EMPTY] * self.width
        else:
            self.colour = {"[m": "", "[36m": "cyan", "[32m": "green"}[code]

    def _newline(self) -> None:
        self.column, self.waiting = 0, False
        self.row += 1
        if self.row == self.height:
            self.gone.append(self.lines.pop(0))
            self.lines.append([EMPTY] * self.width)
            self.row -= 1

    def _put(self, character: str) -> None:
        cells = self._cells(character)
        if cells == 0:  # joins the character before it
            before, colour = self.lines[self.row][self.column - (not self.waiting)]
            self.lines[self.row][self.column - (not self.waiting)] = (before + character, colour)
            return
        if self.waiting or (self.column and self.column + cells > self.width):
            self._newline()
        line = self.lines[self.row]
        line[self.column : self.column + cells] = [(character, self.colour), ("", self.colour)][:cells]
        del line[self.width :]
        self.waiting = self.column + cells >= self.width
        self.column = min(self.column + cells, self.width - 1)

    def _cells(self, character: str) -> int:
        if unicodedata.category(character) in ("Mn", "Me", "Cf"):
            return 0
        if character >= "\U0001f000":
            return self.emoji
        return 2 if unicodedata.east_asian_width(character) in "WF" else 1


@cache
def some_pty() -> int:
    """One for all tests of this process."""
    return pty.openpty()[1]


class ScreenFile:
    """A file that is a terminal: its size is that of a pty, what is written to it appears on a screen."""

    encoding = "utf-8"

    def __init__(self, screen: Screen, known: bool = True) -> None:
        self.screen = screen
        self.written = ""
        termios.tcsetwinsize(some_pty(), (screen.height, screen.width) if known else (0, 0))

    def write(self, text: str) -> int:
        """Show it; the terminal driver begins a new line at its left end."""
        self.written += text
        self.screen.feed(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def fileno(self) -> int:
        """The pty's."""
        return some_pty()

    def isatty(self) -> bool:
        """As the pty says."""
        return os.isatty(self.fileno())


def shown(pieces: Iterable[str], width: int, height: int, emoji: int = 2) -> Screen:
    """A screen with this text and nothing else."""
    return Screen(width, height, emoji).feed("".join(pieces))


def pictures(text: str) -> str:
    """What a terminal is shown for characters that would steer it."""
    steering = {"\x7f": "␡", **{chr(code): "\ufffd" for code in range(0x80, 0xA0)}}
    steering |= dict(zip(map(chr, range(32)), PICTURES, strict=True))
    return "".join(steering.get(character, character) for character in text)
