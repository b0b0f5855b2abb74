"""Tokens become text piece by piece, and rows are printed one after another."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from eval.streaming import Live, Page, TextStream
from eval.terminal import Output, Terminal
from tests.eval.screen import Screen, ScreenFile
from tests.eval.tiny_tokenizers import TOKENIZERS, tokens_named

LETTERS = ["a", "b", "é", "漢", "🙂", ".", "\n", "\ufffd"]


CONTEXTS = ["", "a", "b a", "a b  ", "a.\n"]


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def texts_of(tokenizer: PreTrainedTokenizerBase, context: list[int], chunks: list[list[int]]) -> list[str]:
    stream = TextStream(tokenizer, context)
    return [*(stream.push(chunk) for chunk in chunks), stream.finish()]


def token_lists(tokenizer: PreTrainedTokenizerBase) -> st.SearchStrategy[list[int]]:
    """Tokens of real text, of half characters, and any others, special ones too."""
    text = st.text([*LETTERS, " "], max_size=6).map(lambda t: tokenizer.encode(t, add_special_tokens=False))
    any_token = st.integers(0, len(tokenizer) - 1).map(lambda token: [token])
    special = st.just([len(tokenizer) - 1])
    cut = text.flatmap(lambda tokens: st.integers(0, len(tokens)).map(lambda end: tokens[:end]))
    parts = st.lists(text | any_token | special | cut, max_size=6)
    return parts.map(lambda lists: [token for tokens in lists for token in tokens])


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_the_pieces_are_the_text_however_the_tokens_come(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    context = tokenizer.encode(data.draw(st.sampled_from(CONTEXTS)))
    tokens = data.draw(token_lists(tokenizer))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=len(tokens), max_size=len(tokens)))
    chunks, begin = [], 0
    for size in sizes:
        chunks.append(tokens[begin : begin + size])
        begin += size
    whole = decoded(tokenizer, context + tokens)[len(decoded(tokenizer, context)) :]
    assert "".join(texts_of(tokenizer, context, chunks)) == whole
    assert "".join(texts_of(tokenizer, context, [tokens])) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_a_peek_is_what_a_push_says_and_changes_nothing(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    stream = TextStream(tokenizer, tokenizer.encode("a"))
    for tokens in data.draw(st.lists(token_lists(tokenizer), max_size=3)):
        stream.peek(data.draw(token_lists(tokenizer)))
        assert stream.peek(tokens) == stream.push(tokens)


def test_text_comes_with_its_token_and_a_character_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["bytes"]
    tokens = tokenizer.encode("a é 漢.")
    pieces = texts_of(tokenizer, [], [[token] for token in tokens])
    assert pieces == ["a", " ", "", "é", " ", "", "", "漢", ".", ""]
    assert texts_of(tokenizer, [], [[tokens[2]], tokenizer.encode("a")]) == ["", "\ufffda", ""]
    assert texts_of(tokenizer, [], [[tokens[2]]]) == ["", "\ufffd"]  # nothing followed


def test_a_run_of_byte_tokens_is_said_when_it_is_over() -> None:
    tokenizer = TOKENIZERS["fallback"]
    two, half = tokenizer.encode("漢漢")[1:], tokenizer.encode("漢")[1:3]
    assert len(two) == 6
    (letter,) = tokens_named(tokenizer, "a")
    assert texts_of(tokenizer, [], [two[:3], two[3:], [letter]]) == ["", "", "漢漢a", ""]
    assert texts_of(tokenizer, [], [two[:3], half]) == ["", "", "\ufffd" * 5]
    special = tokens_named(tokenizer, "<s>")
    assert "".join(texts_of(tokenizer, [], [two[:2], special, two[2:3], [letter]])) == "漢a"


def test_the_space_after_the_prompt_is_kept() -> None:
    tokenizer = TOKENIZERS["fallback"]
    word, special = tokens_named(tokenizer, "▁a"), tokens_named(tokenizer, "<s>")
    assert decoded(tokenizer, word) == "a"
    assert texts_of(tokenizer, tokenizer.encode("b"), [word, word]) == [" a", " a", ""]
    assert texts_of(tokenizer, tokenizer.encode("b"), [special, word]) == ["", " a", ""]


def test_the_window_stays_short() -> None:
    tokenizer = TOKENIZERS["bytes"]
    longest = 0
    plain = tokenizer.decode

    class Counting:
        def decode(self, tokens: list[int], **options: Any) -> str:
            nonlocal longest
            longest = max(longest, len(tokens))
            return str(plain(tokens, **options))

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    counting: Any = Counting()
    stream = TextStream(counting, [])
    for token in tokenizer.encode("a é 漢. " * 50):
        stream.push([token])
    assert longest < 12


def live(output: Output, prompts: list[str]) -> Live:
    tokenizer = TOKENIZERS["bytes"]
    heading = "{} of 3" if len(prompts) > 1 else ""
    return Live(
        output,
        [
            Page(heading.format(row), prompt, TextStream(tokenizer, tokenizer.encode(prompt)))
            for row, prompt in enumerate(prompts, start=1)
        ],
    )


def test_what_was_drafted_and_accepted_is_found() -> None:
    file: Any = ScreenFile(Screen(20, 2))
    tokenizer = TOKENIZERS["bytes"]
    listener = live(Terminal(file), ["ab"])
    assert listener.wants_drafts
    listener.emitted(0, tokenizer.encode("."))
    assert file.screen.text == "ab."
    listener.drafted(0, tokenizer.encode("éa"))
    assert file.screen.text == "ab.éa"
    listener.emitted(0, tokenizer.encode("éb"))
    assert file.screen.text == "ab.éb"
    assert file.screen.coloured("green") == "é"
    listener.emitted(0, tokenizer.encode("éb"))  # no draft this time
    assert file.screen.coloured("green") == "é"
    listener.finish()
    assert (file.screen.row, file.screen.column) == (1, 0)


def test_only_the_draft_of_the_row_that_is_printed_is_shown() -> None:
    file: Any = ScreenFile(Screen(20, 9))
    listener = live(Terminal(file), ["x", "y"])
    for row in (0, 1):
        listener.emitted(row, TOKENIZERS["bytes"].encode("."))
    for row, letter in enumerate("ab"):
        listener.drafted(row, TOKENIZERS["bytes"].encode(letter))
        assert file.screen.coloured("cyan") == "a"
    listener.emitted(1, TOKENIZERS["bytes"].encode("b"))  # the first has ended
    assert file.screen.coloured("cyan") == ""
    assert file.screen.coloured("green") == "b"
    assert [line.rstrip(" ─") for line in file.screen.text.split("\n")] == [
        "── 1 of 3",
        "x.",
        "── 2 of 3",
        "y.b",
    ]


def test_rows_are_printed_one_after_another_each_as_early_as_it_can() -> None:
    file = io.StringIO()
    listener = live(Output(file), ["x", "y", "z"])
    assert not listener.wants_drafts
    letters = {name: TOKENIZERS["bytes"].encode(name) for name in "abc"}
    told = [
        ([(0, "a"), (1, "b"), (2, "c")], "-- 1 of 3 --\nxa"),
        ([(0, "a"), (2, "c")], "a"),  # the second has ended
        ([(2, "a")], "\n-- 2 of 3 --\nyb\n-- 3 of 3 --\nzcca"),  # the first has, too
        ([(2, "b")], "b"),
    ]
    for step, printed in told:
        before = len(file.getvalue())
        for row, letter in step:
            listener.emitted(row, letters[letter])
        assert file.getvalue()[before:] == printed
    before = len(file.getvalue())
    listener.finish()
    assert file.getvalue()[before:] == "\n"
