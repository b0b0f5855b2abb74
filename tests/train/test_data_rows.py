from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

import train.data.tables as tables
from layerskip_model.errors import UserError
from tests.train.data_files import WRITERS, write_jsonl, write_parquet
from train.data.examples import Conversation, Document, MalformedRow, Pair, Tolerance, conversation_of
from train.data.fingerprints import FileHashes
from train.data.sources import Source
from train.data.streams import SourceLost

TEXTS = [{"text": f"text {i}", "other": i} for i in range(7)]


def source(kind: str, path: Path | str, **settings: Any) -> Source:
    adapter: TypeAdapter[Source] = TypeAdapter(Source)
    return adapter.validate_python({"kind": kind, "files": [str(path)], **settings})


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_is_its_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_PIECE", 3)
    monkeypatch.chdir(tmp_path)
    write, kind = WRITERS[name]
    write(Path("a"), TEXTS[:5])
    write(Path("b"), TEXTS[5:])
    expected = [Document(f"a:{i + 1}", f"text {i}") for i in range(5)]
    expected += [Document("b:1", "text 5"), Document("b:2", "text 6")]
    assert list(source(kind, "[ab]").documents()) == expected
    for skip, limit in ((0, 3), (4, 2), (5, 2), (6, None), (2, 1)):
        chosen = list(source(kind, "[ab]", skip=skip, limit=limit).documents())
        assert chosen == expected[skip : None if limit is None else skip + limit]
    with pytest.raises(UserError, match=r"files \['\[ab\]'\]: skip: 7 leaves nothing of its 7 rows"):
        list(source(kind, "[ab]", skip=7).documents())


@pytest.mark.parametrize("name", WRITERS)
def test_a_stream_goes_on_from_any_state(name: str, tmp_path: Path) -> None:
    write, kind = WRITERS[name]
    write(tmp_path / "a", TEXTS[:5])
    write(tmp_path / "b", TEXTS[5:])
    streamed = source(kind, tmp_path / "*", streaming=True, skip=1, limit=5)
    whole = list(streamed.stream())
    assert len(whole) == 5
    stream = streamed.stream()
    for i in range(6):
        assert list(streamed.stream(stream.state())) == whole[i:]
        next(stream, None)


def test_pairs_and_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"q": "one?", "a": "yes", "m": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"q": "two?", "a": "no", "m": [{"from": "human", "value": "so"}, {"from": "gpt", "value": "ya"}]},
    ]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for name, (write, kind) in WRITERS.items():
        write(Path(name), rows)
        pairs = source(kind, name, pair={"prompt": "q", "response": "a"})
        talks = source(kind, name, conversation="m")
        assert list(pairs.documents()) == [Pair(f"{name}:1", "one?", "yes"), Pair(f"{name}:2", "two?", "no")]
        assert next(talks.documents()) == Conversation(f"{name}:1", messages)
        assert pairs.whole
        assert talks.whole
        assert not source(kind, name, field="q").whole
    assert Pair("x", "one?", "yes").text == "one?yes"
    assert Conversation("x", messages).text == "hi\nyo"


def test_what_a_message_may_hold() -> None:
    calls = [{"function": {"name": "f"}}]
    given = [
        {"role": "user", "content": "hi", "tool_calls": None},  # as tables fill up what a row has not
        {"role": "assistant", "content": None, "tool_calls": calls, "thinking": "hm"},
        {"role": "tool", "content": "4"},
    ]
    assert conversation_of({"m": given}, "m", "a:1").messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": calls, "thinking": "hm"},
        {"role": "tool", "content": "4"},
    ]


ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "it must be a list of messages"),
        ([], "it must be a list of messages"),
        ("hi", "it must be a list of messages"),
        (["hi", ANSWER], "message 1 is 'hi'; it must have a role"),
        ([ASK, {"content": "yo"}], r"message 2 has no role; its keys are \['content'\]"),
        ([ASK, {"role": "assistant", "content": 5}], r"message 2 \('assistant'\) has content 5"),
        ([ASK], "a conversation without an answer"),
        ([ASK, {"role": "assistant", "content": ""}], "a conversation without an answer"),
        (
            [{"from": "human", "value": "hi"}, {"from": "bot", "value": "a"}],
            "a conversation without an answer",
        ),
    ],
)
def test_malformed_conversations(messages: Any, reason: str) -> None:
    with pytest.raises(MalformedRow, match=f"^a:1: .*{reason}"):
        conversation_of({"m": messages}, "m", "a:1")
    with pytest.raises(MalformedRow, match=r"^a:1: no field 'n'; the row has"):
        conversation_of({"m": messages}, "n", "a:1")


def test_malformed_rows_are_passed_over_as_often_as_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "x"}\n{"text"\n{"text": "y"}\n')
    Path("b.jsonl").write_bytes(b'{"text": "z"}\n\n[]\n{"text": 5}\n{"text": "w"}\n{"text": "\xe9"}\n')
    first, second = source("jsonl", "a.jsonl"), source("jsonl", "b.jsonl")
    tolerance = Tolerance(3)
    for _ in range(2):  # what is read again counts once
        assert [document.text for document in first.documents(tolerance)] == ["x", "y"]
        stream = second.documents(tolerance)
        assert [next(stream).text, next(stream).text] == ["z", "w"]
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in told] == ["a.jsonl:2", "b.jsonl:3", "b.jsonl:4"]
    assert told[0].startswith("passed over malformed row 1 of at most 3: a.jsonl:2: not JSON")
    with pytest.raises(UserError, match=r"^b\.jsonl:6: not UTF-8.*set data\.skip_malformed, now 3"):
        next(stream)
    again = Tolerance(3, tolerance.passed)  # after a resume
    assert [document.text for document in first.documents(again)] == ["x", "y"]
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match=r"^a\.jsonl:2: not JSON"):
        list(first.documents())


@pytest.mark.parametrize("empty", ["prompt", "response"])
def test_a_pair_with_an_empty_half_is_malformed(empty: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a", [{"prompt": "x", "response": "y"} | {empty: " "}])
    with pytest.raises(UserError, match=f"a:1: the {empty} is empty"):
        list(source("jsonl", path, pair={"prompt": "prompt", "response": "response"}).documents())


@pytest.mark.parametrize("name", ["parquet", "arrow stream", "arrow file"])
def test_bad_tables_are_named(name: str, tmp_path: Path) -> None:
    write, kind = WRITERS[name]
    path = write(tmp_path / "a", TEXTS)
    missing = source(kind, path, pair={"prompt": "text", "response": "answer"})
    with pytest.raises(
        UserError, match=r"a: no column 'answer'; the file has \['other', 'text'\]: set 'pair"
    ):
        next(missing.documents())
    with pytest.raises(UserError, match="a:1: field 'other' is 0; it must be a string"):
        next(source(kind, path, field="other").documents())
    whole = path.read_bytes()
    cut, changed = whole[: len(whole) // 2], whole[:50] + b"\xff" * 50 + whole[100:]
    unreadable = [cut, b"", b"hello world, this is text"]
    for damage in unreadable if name == "arrow file" else [*unreadable, changed]:
        path.write_bytes(damage)
        with pytest.raises(UserError, match=f"a: damaged, or no {kind} file \\(.*; replace it"):
            list(source(kind, path).documents())
    write(path, [{"text": ""}])
    with pytest.raises(UserError, match="every document is empty"):
        list(source(kind, path).documents())


def test_only_the_needed_columns_and_row_groups_of_parquet_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a", TEXTS)
    read: list[Any] = []
    original = tables_reader().iter_batches

    def noted(self: Any, size: int, row_groups: list[int], columns: list[str]) -> Any:
        read.append((row_groups, columns))
        return original(self, size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(tables_reader(), "iter_batches", noted)
    assert [name for name, _ in tables.parquet_rows(str(path), "a", 5, {"text": "field"})] == ["a:6", "a:7"]
    assert read == [([2], ["text"]), ([3], ["text"])]


def tables_reader() -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile


def test_fingerprints_are_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    memory = tmp_path / "memory" / "hashes.json"
    hashes = FileHashes(memory)
    first = source("jsonl", path).fingerprint(hashes)
    hashes.save()
    same = [source("jsonl", tmp_path / "*.jsonl"), source("jsonl", path, weight=2.0, streaming=True)]
    assert {one.fingerprint() for one in same} == {first}
    others = [
        source("jsonl", path, field="other"),
        source("jsonl", path, skip=1),
        source("jsonl", path, limit=9),
    ]
    assert len({first, *(one.fingerprint() for one in others)}) == 4

    def unread(*_: Any) -> Any:
        raise AssertionError("it was read again")

    with monkeypatch.context() as patched:
        patched.setattr("hashlib.file_digest", unread)
        assert source("jsonl", path).fingerprint(FileHashes(memory)) == first
    write_jsonl(path, TEXTS[:3])
    assert source("jsonl", path).fingerprint(FileHashes(memory)) != first
    memory.write_text("[]")
    assert FileHashes(memory).of(str(path)) == FileHashes().of(str(path))
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read"):
        FileHashes().of(str(path))


def test_a_lost_file_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(2)])
    lost, aside = tmp_path / "b.jsonl", tmp_path / "aside"
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            aside.rename(lost)

    streamed = source("jsonl", tmp_path / "*.jsonl", streaming=True)
    stream = streamed.stream(sleep=sleep)
    found = [next(stream).text, next(stream).text]
    lost.rename(aside)
    assert found + [document.text for document in stream] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert pauses == [1.0, 5.0, 15.0]
    assert "lost after 2 rows" in capsys.readouterr().err.splitlines()[0]

    stream = streamed.stream(sleep=lambda _: None)
    next(stream), next(stream)
    lost.unlink()
    with pytest.raises(
        SourceLost, match=r"cannot be read after 2 rows \(6 attempts; .*b\.jsonl.*same command"
    ):
        next(stream)
    state = stream.state()
    with pytest.raises(UserError, match="the data had been read up to here, and the file is gone"):
        next(streamed.stream(state))
    write_jsonl(lost, [{"text": "b0"}, {"text": "b1"}])
    assert [document.text for document in streamed.stream(state)] == ["b0", "b1", "c0", "c1"]
