from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerskip_model.errors import UserError
from tests.train.data_files import write_parquet
from train.data.examples import Document, Pair
from train.data.hub import HubCursor, HubSource
from train.data.row_forms import PairKeys
from train.data.streams import SourceLost

TEXTS = [{"text": f"text {i}", "answer": f"{i}"} for i in range(7)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of two files of 5 and 2 rows in row groups of 2."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train-0.parquet", TEXTS[:5])
    write_parquet(tmp_path / "set" / "train-1.parquet", TEXTS[5:])
    return str(tmp_path / "set")


def source(name: str, **settings: Any) -> HubSource:
    return HubSource.model_validate({"kind": "hub", "name": name, **settings})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_its_rows_from_any_state_on(folder: str, streaming: bool) -> None:
    loaded = source(folder, streaming=streaming)
    expected = [Document(f"{folder}[train]:{i + 1}", f"text {i}") for i in range(7)]
    assert list(loaded.documents()) == expected
    part = source(folder, streaming=streaming, skip=2, limit=4)
    assert list(part.documents()) == expected[2:6]
    stream = part.stream()
    for i in range(5):
        state = json.loads(json.dumps(stream.state()))
        assert list(part.stream(state)) == expected[2 + i : 6]
        next(stream, None)
    pairs = source(folder, streaming=streaming, pair=PairKeys(prompt="text", response="answer"))
    assert next(pairs.documents()) == Pair(f"{folder}[train]:1", "text 0", "0")


def test_the_fingerprint_is_of_the_content(folder: str) -> None:
    before = source(folder).fingerprint()
    assert source(folder, streaming=True).fingerprint() == before
    assert source(folder, field="answer").fingerprint() != before
    write_parquet(Path(folder) / "train-1.parquet", TEXTS)
    assert source(folder).fingerprint() != before


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_not_there_is_named(folder: str, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "nobody/nothing"}, "'nobody/nothing' .* cannot be opened: .*HF_HUB_OFFLINE"),
        ({"name": folder + "/none"}, "none' .* cannot be opened"),
        ({"split": "test"}, "split test.* cannot be opened: .*test.*"),
        ({"config": "large"}, "config large.* cannot be opened: .*large"),
        ({"field": "body"}, r"no column 'body'; it has \['answer', 'text'\]: set 'field' to one"),
    ]
    for settings, reason in cases:
        with pytest.raises(UserError, match=reason):
            next(source(settings.pop("name", folder), streaming=streaming, **settings).documents())
    with pytest.raises(UserError, match="'nobody/nothing'"):
        source("nobody/nothing").fingerprint()


def test_a_connection_that_breaks_is_tried_again(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each third attempt to read goes through, then none."""
    attempts = 0
    works = True
    original = HubCursor.__next__

    def breaking(self: HubCursor) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts % 3 or not works:
            raise TimeoutError("read timed out")
        return original(self)

    monkeypatch.setattr(HubCursor, "__next__", breaking)
    stream = source(folder, streaming=True).stream(sleep=lambda _: None)
    assert [next(stream).text for _ in range(6)] == [f"text {i}" for i in range(6)]
    assert attempts == 18
    assert "lost after 5 rows (read timed out); trying again in 5 s (2 of 5)" in capsys.readouterr().err
    works = False
    with pytest.raises(SourceLost, match=r"\[train\]': cannot be read after 6 rows \(6 attempts; read timed"):
        next(stream)
    works = True
    assert next(source(folder, streaming=True).stream(stream.state(), sleep=lambda _: None)).text == "text 6"


def test_without_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        source("a/b").fingerprint()
