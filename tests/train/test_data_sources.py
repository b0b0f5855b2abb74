from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from layerskip_model.errors import UserError
from train.data.sources import DataConfig, Document, JsonlSource, StdlibSource, TextSource, split_documents


def config(train: list[dict[str, Any]], heldout: Any = 0.05) -> DataConfig:
    return DataConfig.model_validate({"train": train, "heldout": heldout})


def test_stdlib_is_real_code_in_a_fixed_order() -> None:
    documents = list(StdlibSource(kind="stdlib").documents())
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"argparse.py", "asyncio/base_events.py", "json/decoder.py"} <= set(names)
    for left_out in (
        "/test/",
        "/tests/",
        "/idle_test/",
        "site-packages",
        "encodings/",
        "_sysconfigdata",
        "topics",
    ):
        assert not [name for name in names if left_out in f"/{name}"]
    assert 7e6 < sum(len(document.text.encode()) for document in documents) < 13e6
    root = Path(sysconfig.get_path("stdlib"))
    assert documents[0].text == (root / names[0]).read_bytes().decode()


def test_text_files_are_documents_once_and_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes(b"two\r\n")
    (tmp_path / "deep" / "er" / "a.txt").write_text("one")
    (tmp_path / "empty.txt").write_text(" \n")
    source = TextSource(kind="text", files=["**/*.txt", "./b.txt"])
    assert list(source.documents()) == [Document("b.txt", "two\r\n"), Document("deep/er/a.txt", "one")]


def test_unusable_text_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    for pattern, reason in (
        ("*.md", r"'\*\.md' matches no file"),
        ("empty*", r"\['empty\*'\]: every document is empty"),
        ("latin.txt", "latin.txt: not UTF-8"),
    ):
        with pytest.raises(UserError, match=reason):
            list(TextSource(kind="text", files=[pattern]).documents())


def test_jsonl_rows_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n\n{"body": ""}\n{"body": "two"}\n')
    source = JsonlSource(kind="jsonl", files=["a.jsonl"], field="body")
    assert list(source.documents()) == [Document("a.jsonl:1", "one"), Document("a.jsonl:4", "two")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"body": "x"}', "a.jsonl:2: no field 'text'"),
        ('{"text": ["x"]}', r"a.jsonl:2: field 'text' is \['x'\]"),
        ('{"text": ', "a.jsonl:2: not JSON"),
    ],
)
def test_a_bad_jsonl_row_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line)
    with pytest.raises(UserError, match=reason):
        list(JsonlSource(kind="jsonl", files=["a.jsonl"]).documents())


def test_empty_jsonl_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="every document is empty"):
        list(JsonlSource(kind="jsonl", files=[str(tmp_path / "*.jsonl")]).documents())


@pytest.mark.parametrize(
    ("section", "place"),
    [
        ({"train": []}, ("train",)),
        ({"train": [{"kind": "web"}]}, ("train", 0)),
        ({"train": [{"kind": "stdlib", "files": ["x"]}]}, ("train", 0, "stdlib", "files")),
        ({"train": [{"kind": "text", "files": []}]}, ("train", 0, "text", "files")),
        ({"train": [{"kind": "stdlib"}], "heldout": 0.5}, ("heldout", "fraction")),
        ({"train": [{"kind": "stdlib"}], "heldout": 0.0}, ("heldout", "fraction")),
        ({"train": [{"kind": "stdlib"}], "heldout": []}, ("heldout", "sources")),
    ],
)
def test_a_bad_section_has_one_error_at_its_place(
    section: dict[str, Any], place: tuple[str | int, ...]
) -> None:
    with pytest.raises(ValidationError) as caught:
        DataConfig.model_validate(section)
    assert [error["loc"] for error in caught.value.errors()] == [place]


def write_texts(folder: Path, texts: list[str]) -> None:
    rows = [json.dumps({"text": text}) for text in texts]
    (folder / "a.jsonl").write_text("\n".join(rows))


def test_fraction_splits_every_document_to_one_side_whatever_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(400):
        (tmp_path / f"{i:03}.txt").write_text(f"text {i}")
    low, high = {"kind": "text", "files": ["[01]*.txt"]}, {"kind": "text", "files": ["[23]*.txt"]}
    training, heldout = (list(part) for part in split_documents(config([low, high], 0.1)))
    assert sorted(d.name for d in training + heldout) == [f"{i:03}.txt" for i in range(400)]
    assert 20 <= len(heldout) <= 60  # 40 expected, standard deviation 6
    backwards = [set(part) for part in split_documents(config([high, low], 0.1))]
    assert backwards == [set(training), set(heldout)]


def test_two_documents_give_one_to_each_side_and_one_is_refused(tmp_path: Path) -> None:
    source = {"kind": "jsonl", "files": [str(tmp_path / "a.jsonl")]}
    write_texts(tmp_path, ["one", "two"])
    training, heldout = split_documents(config([source], 0.001))
    assert len(list(training)) == len(list(heldout)) == 1
    write_texts(tmp_path, ["one"])
    with pytest.raises(UserError, match=r"data.heldout=0.05: no training document is left of 1"):
        split_documents(config([source]))


def test_heldout_sources_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    sources = [{"kind": "text", "files": [str(tmp_path / name)]} for name in ("a.txt", "b.txt")]
    training, heldout = split_documents(config(sources[:1], sources[1:]))
    for part, text in ((training, "a"), (heldout, "b")):
        assert [d.text for d in part] == [text]
        assert [d.text for d in part] == [text]  # it can be read again
