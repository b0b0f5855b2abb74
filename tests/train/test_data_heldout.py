from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.exits import Answer, heldout_texts
from eval.target import Target
from layerskip_model.chat import ChatTemplate
from layerskip_model.jsonl import read_prompts, read_rows
from tests.chats import PLAIN, byte_tokenizer, talk
from train.data.encoding import ConversationEncoder, PairEncoder
from train.data.examples import Conversation, Document, Pair, Tolerance
from train.data.heldout import tile, write_heldout

TEXT = "".join(f"line {i}: " + "é" * (i * 7 % 40) + "\n" for i in range(400))

texts = st.text(st.sampled_from("ab é漢\U0001f600\t\r\n\n  "), max_size=120) | st.text(max_size=60)


@settings(max_examples=300, deadline=None)
@given(texts, st.integers(4, 60), st.integers(4, 20))
def test_tiles_join_to_the_text(text: str, piece_bytes: int, prompt_bytes: int) -> None:
    tiles = tile(text, piece_bytes, prompt_bytes)
    assert "".join(prompt + response for prompt, response in tiles) == (text if text.strip() else "")
    assert all(prompt.strip() for prompt, _ in tiles)
    # A piece ends inside a line only if that line is longer than a piece.
    end = 0
    for prompt, response in tiles[:-1]:
        end += len(prompt + response)
        line = text[text.rfind("\n", 0, end) + 1 : (text + "\n").index("\n", end - 1) + 1]
        assert text[end - 1] == "\n" or len(line.encode()) > piece_bytes


def test_sizes_are_about_what_is_asked() -> None:
    tiles = tile(TEXT, 1500, 250)
    assert len(tiles) == round(len(TEXT.encode()) / 1500)
    for prompt, response in tiles:
        assert prompt.endswith("\n")
        assert response.endswith("\n")
        assert abs(len((prompt + response).encode()) - 1500) < 200
        assert abs(len(prompt.encode()) - 250) < 90  # half a line, at most


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" \n\n", []),
        ("one\n", [("one\n", "")]),
        ("one two three four", [("one two", " three four")]),
        ("abcdefghijklmnop", [("abcdefgh", "ijklmnop")]),
        ("one\ntwo tw\nthree\nfour", [("one\ntwo tw\n", "three\nfour")]),
        ("\n\n\n\n\n\n\n\n\n\nx\ny", [("\n\n\n\n\n\n\n\n\n\nx\n", "y")]),
        ("éééééééé", [("éééé", "éééé")]),
    ],
)
def test_where_a_prompt_ends(text: str, expected: list[tuple[str, str]]) -> None:
    assert tile(text, 40, 8) == expected


def test_a_long_line_is_cut_into_even_pieces() -> None:
    tiles = tile("漢" * 10_000, 1500, 250)
    assert len(tiles) == 20
    assert {len(prompt) for prompt, _ in tiles} == {83}
    assert {len(prompt + response) for prompt, response in tiles} == {500}


def test_rows_name_their_documents_and_are_prompts(tmp_path: Path) -> None:
    documents = [Document("a", TEXT), Document("b", "one\ntwo\n")]
    path = tmp_path / "heldout.jsonl"
    number = write_heldout(documents, path)
    rows = [row for _, row in read_rows(path)]
    assert number == len(rows) == len(read_prompts(path))
    for document in documents:
        joined = "".join(row["prompt"] + row["response"] for row in rows if row["document"] == document.name)
        assert joined == document.text


def test_examples_are_one_row_each_and_say_whose_special_tokens_they_have(tmp_path: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    tokenizer = byte_tokenizer(template=PLAIN, begins=True)
    chat = ChatTemplate.load(tokenizer)
    refused = [{"role": "robot", "content": "hi"}, *talk("hi", "yo")]
    documents = [
        Pair("a", "one?\n", "yes"),
        Conversation("b", talk("hi", "yo", "so?", "no", "bye")),
        Conversation("c", refused),
    ]
    assert write_heldout(documents, path, chat=chat) == 2
    prompt = "<s>USER: hi ASSISTANT: yo</s>USER: so? ASSISTANT:"
    assert [row for _, row in read_rows(path)] == [
        {"prompt": "one?\n", "response": "yes", "document": "a", "special_tokens": True},
        {"prompt": prompt, "response": "no", "document": "b", "special_tokens": False},
    ]
    assert [row.special_tokens for row in read_prompts(path)] == [True, False]
    pair, answer = heldout_texts(path)
    assert pair == Answer("one?\n", "yes", True)
    assert answer == Answer(prompt, "no", False)


def test_the_evaluator_gives_the_model_the_ids_that_it_was_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    tokenizer = byte_tokenizer(("a", "b"), template=PLAIN, begins=True)
    documents = [Pair("a", "aa", "b"), Conversation("b", talk("hi", "yo", "so?", "no"))]
    write_heldout(documents, path, chat=ChatTemplate.load(tokenizer))
    trained = [*PairEncoder(tokenizer)(documents[:1])]
    trained += ConversationEncoder(ChatTemplate.load(tokenizer), Tolerance())(documents[1:])
    target = Target("", None, tokenizer, None)  # type: ignore[arg-type]
    for row, encoded in zip(read_prompts(path), trained, strict=True):
        ids = target.encode_row(row)
        assert encoded.ids[: len(ids)] == ids
        assert encoded.counted is not None
        assert all(encoded.counted[len(ids) :])
        assert not encoded.counted[len(ids) - 1]


def test_the_limit_takes_whole_documents_evenly_spaced(tmp_path: Path) -> None:
    documents = [Document(f"{i}", "some words\n" * 2 * (1 + i % 3)) for i in range(60)]
    full = {document.name: tile(document.text, 22, 11) for document in documents}
    path = tmp_path / "heldout.jsonl"
    assert write_heldout(documents, path, piece_bytes=22, prompt_bytes=11, max_rows=1000) == 120
    number = write_heldout(documents, path, piece_bytes=22, prompt_bytes=11, max_rows=30)
    rows = [row for _, row in read_rows(path)]
    assert 20 <= number == len(rows) <= 30
    names = list(dict.fromkeys(row["document"] for row in rows))
    for name in names:
        assert [(r["prompt"], r["response"]) for r in rows if r["document"] == name] == full[name]
    gaps = [int(right) - int(left) for left, right in pairwise(names)]
    assert max(gaps) - min(gaps) <= 1


def test_one_document_longer_than_the_limit_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    assert write_heldout([Document("a", TEXT)], path, max_rows=3) == 3
    rows = [row for _, row in read_rows(path)]
    assert TEXT.startswith("".join(row["prompt"] + row["response"] for row in rows))
