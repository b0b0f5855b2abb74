"""Text that is printed while it is generated: tokens become text, rows take turns."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from eval.decoding.speculate import Listener
from eval.terminal import Output, Piece


class TextStream:
    """The text of tokens that come bit by bit, special tokens left out, as far as later tokens cannot change it.

    All that it said together is the text that the tokens add to that of the `context` before them, whose
    last tokens decide whether there is a space between the two.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        # Decoded again at every call; what stands before it has been said and changes nothing any more.
        self._window = list(context)
        self._settled = len(self._window)  # the first tokens of the window, whose text is final
        self._said = self._decode(self._window)
        # Tokenizers that spell rare characters with tokens such as <0xE2> decode a run of them as a whole.
        self._half_character: list[int] = []
        byte = tokenizer.convert_tokens_to_ids("<0xE2>")  # the unknown token or None, if there is none
        if isinstance(byte, int) and tokenizer.convert_ids_to_tokens(byte) == "<0xE2>":
            self._half_character = [byte]

    def push(self, tokens: Sequence[int]) -> str:
        """The text that has become final with these tokens."""
        self._window += tokens
        final = self._final(self._window)
        text = self._say(final)
        if final == self._decode(self._window):
            self._shorten()
        return text

    def peek(self, tokens: Sequence[int]) -> str:
        """What `push` would return."""
        return self._final([*self._window, *tokens])[len(self._said) :]

    def finish(self) -> str:
        """The rest: nothing follows."""
        return self._say(self._decode(self._window))

    def _say(self, text: str) -> str:
        """What is new in the text of the window."""
        new = text[len(self._said) :]
        self._said += new
        return new

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _final(self, tokens: list[int]) -> str:
        """Their text without what may still become another: the first bytes of a character, or a run of bytes."""
        text = self._decode(tokens)
        if self._half_character:  # a run that goes on changes as a whole
            text = text[: common_length(text, self._decode([*tokens, *self._half_character]))]
        return text.rstrip("\ufffd")

    def _shorten(self) -> None:
        """Drop what was settled the last time, if what came since has text of its own to lean on."""
        recent = self._window[self._settled :]
        text = self._decode(recent)
        if text.strip():
            self._window, self._said = recent, text
        self._settled = len(self._window)


class Page:
    """What is printed of one prompt: a heading, if any, the prompt, and then its continuation."""

    def __init__(self, heading: str, prompt: str, stream: TextStream) -> None:
        self.heading = heading
        self.stream = stream
        self.pieces: list[Piece] = [(prompt, False)]  # not printed yet
        self.drafted: list[int] = []

    def add(self, tokens: Sequence[int]) -> None:
        """Take tokens of the continuation."""
        accepted = common_length(self.drafted, tokens)
        self.drafted = []
        self.pieces += [
            (self.stream.push(tokens[:accepted]), True),
            (self.stream.push(tokens[accepted:]), False),
        ]


class Live(Listener):
    """Prints the rows of a batch one after another, the first that has not ended while it grows."""

    def __init__(self, output: Output, pages: Sequence[Page]) -> None:
        self.output = output
        self.pages = pages
        self.wants_drafts = output.shows_drafts
        self._row = 0  # what is being printed
        self._told: list[int] = []  # the rows that grew in this step

    def drafted(self, row: int, tokens: list[int]) -> None:
        """Show it if its row is being printed."""
        page = self.pages[row]
        page.drafted = tokens
        if row == self._row:
            self.output.draft(page.stream.peek(tokens))

    def emitted(self, row: int, tokens: list[int]) -> None:
        """Print them, or keep them until it is their row's turn."""
        if self._told and row <= self._told[-1]:
            self._told = []
        self._told.append(row)
        self.pages[row].add(tokens)
        # Rows are told of in order, and in every step until they end: one that is passed over has ended.
        while self._row < row and self._row not in self._told:
            self._end_page()
        self._print()

    def finish(self) -> None:
        """Print what is left: no row grows any more."""
        while self._row < len(self.pages):
            self._end_page()

    def _print(self) -> None:
        page = self.pages[self._row]
        if page.heading:
            self.output.rule(page.heading)
            page.heading = ""
        self.output.write(page.pieces)
        page.pieces = []

    def _end_page(self) -> None:
        page = self.pages[self._row]
        page.pieces += [(page.stream.finish(), False), ("\n", False)]
        self._print()
        self._row += 1


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """How far two sequences begin alike."""
    unlike = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(unlike, min(len(one), len(other)))
