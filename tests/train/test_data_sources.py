from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from layerskip_model.errors import UserError
from tests.train.small_recipe import small_values
from train.config import parse_recipe
from train.data.examples import Document, Tolerance
from train.data.local import JsonlSource, StdlibSource, TextSource
from train.data.sources import DataConfig, DocumentSet, heldout_limit, split_documents


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


def split(section: DataConfig) -> tuple[DocumentSet, DocumentSet]:
    tolerance = Tolerance(section.skip_malformed)
    return split_documents(section, heldout_limit(section, tolerance), tolerance)


def test_fraction_splits_every_document_to_one_side_whatever_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(400):
        (tmp_path / f"{i:03}.txt").write_text(f"text {i}")
    low, high = {"kind": "text", "files": ["[01]*.txt"]}, {"kind": "text", "files": ["[23]*.txt"]}
    training, heldout = (list(part) for part in split(config([low, high], 0.1)))
    assert sorted(d.name for d in training + heldout) == [f"{i:03}.txt" for i in range(400)]
    assert 20 <= len(heldout) <= 60  # 40 expected, standard deviation 6
    backwards = [set(part) for part in split(config([high, low], 0.1))]
    assert backwards == [set(training), set(heldout)]


def test_two_documents_give_one_to_each_side_and_one_is_refused(tmp_path: Path) -> None:
    source = {"kind": "jsonl", "files": [str(tmp_path / "a.jsonl")]}
    write_texts(tmp_path, ["one", "two"])
    training, heldout = split(config([source], 0.001))
    assert len(list(training)) == len(list(heldout)) == 1
    write_texts(tmp_path, ["one"])
    with pytest.raises(UserError, match=r"data.heldout=0.05: no training document is left of 1"):
        split(config([source]))


def test_heldout_sources_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    sources = [{"kind": "text", "files": [str(tmp_path / name)]} for name in ("a.txt", "b.txt")]
    training, heldout = split(config(sources[:1], sources[1:]))
    for part, text in ((training, "a"), (heldout, "b")):
        assert [d.text for d in part] == [text]
        assert [d.text for d in part] == [text]  # it can be read again


def test_a_file_that_cannot_be_read_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")

    def refused(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(
        UserError, match=r"a\.txt'\]: cannot be read after 0 rows \(.*Permission denied.*mend"
    ):
        list(TextSource(kind="text", files=[str(tmp_path / "a.txt")]).documents())


FILES = {"kind": "jsonl", "files": ["a.jsonl"]}
STREAM = FILES | {"streaming": True}
TALK = FILES | {"conversation": "messages"}


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"train": [FILES | {"weight": 1.0}, FILES]}, "data.train: 1 of 2 sources have a weight"),
        (
            {"train": [FILES | {"weight": 0.0}] * 2},
            r"data.train: the sources' weights \[0.0, 0.0\] sum to zero",
        ),
        ({"train": [FILES | {"weight": -1.0}]}, "data.train.0.weight: must be greater than or equal to 0"),
        (
            {"train": [FILES, STREAM], "heldout": [FILES]},
            "data.train: several sources .* need a 'weight' each",
        ),
        ({"train": [STREAM]}, "data.heldout: no share can be taken of a stream; give a list"),
        ({"train": [STREAM], "heldout": [STREAM]}, "data.heldout: a stream needs a 'limit'"),
        ({"train": [FILES], "heldout": [FILES | {"weight": 1.0}]}, "data.heldout: held-out .* no weight"),
        (
            {"train": [FILES], "chat_template": "a.jinja"},
            "data.chat_template: no source has a 'conversation'",
        ),
        (
            {"train": [TALK | {"field": "text"}]},
            r"data.train.0.field: give one of 'field', .* not \['field', ",
        ),
        ({"train": [FILES | {"pair": {"prompt": "a"}}]}, "data.train.0.pair.response: missing"),
        ({"train": [FILES | {"kind": "csv"}]}, "data.train.0.kind: 'csv' is not valid"),
        ({"train": [FILES | {"skip": -1}]}, "data.train.0.skip: must be greater than or equal to 0"),
        ({"train": [{"kind": "topv2"}]}, "data.train.0.files: give exactly one of 'files' and 'name'"),
        ({"train": [FILES | {"kind": "topv2", "split": "test"}]}, "data.train.0.split: belongs to 'name'"),
        ({"train": [FILES], "skip_malformed": -1}, "data.skip_malformed: must be greater"),
    ],
)
def test_what_does_not_go_together_is_named(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_recipe(small_values(data=section))


def test_what_goes_together() -> None:
    weighed = FILES | {"weight": 2}
    for section in (
        {"train": [weighed, STREAM | {"weight": 0.5}], "heldout": [STREAM | {"limit": 5}]},
        {"train": [STREAM | {"skip": 5}], "heldout": [STREAM | {"limit": 5}]},
        {"train": [TALK, FILES], "chat_template": "a.jinja"},
    ):
        assert DataConfig.model_validate(section).heldout_sources or section["train"] == [TALK, FILES]
