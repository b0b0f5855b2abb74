from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_prompts, write_rows
from train.data import making
from train.data.cache import Cache
from train.data.examples import Document, Tolerance
from train.data.prepare import PreparedData, prepare
from train.data.sources import DataConfig, heldout_limit, split_documents
from train.data.streams import SourceSection
from train.data.tokenizer import TokenizerConfig, train_tokenizer
from train.processes import join

TRAIN_280 = TokenizerConfig.model_validate({"train": {"vocab_size": 280}})
TEXTS = [f"def f{i}():\n    return {i}\n" * 3 for i in range(12)]


class OtherProcess(PartialState):
    is_main_process = False


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for i, text in enumerate(TEXTS):
        Path(f"{i:02}.txt").write_text(text)
    return tmp_path


def config(heldout: Any = 0.2, **changes: Any) -> DataConfig:
    train = [{"kind": "text", "files": ["*.txt"]}]
    return DataConfig.model_validate({"train": train, "heldout": heldout} | changes)


def run(
    folder: Path,
    data: DataConfig | None = None,
    tokenizer: TokenizerConfig = TRAIN_280,
    *,
    main: bool = True,
    length: int = 16,
) -> PreparedData:
    state = join() if main else OtherProcess()
    return prepare(data or config(), tokenizer, folder / "data", state, length=length)


def documents_of(data: DataConfig) -> tuple[list[Document], list[Document]]:
    tolerance = Tolerance()
    training, heldout = split_documents(data, heldout_limit(data, tolerance), tolerance)
    return list(training), list(heldout)


def made_at(directory: Path) -> dict[str, int]:
    """Every file of the data directory but the manifest, which is written each time."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.parent != directory]
    return {path.relative_to(directory).as_posix(): path.stat().st_mtime_ns for path in files}


def ids_of(prepared: PreparedData, part: str) -> list[int]:
    rows = getattr(prepared, part).parts
    return [token for source in rows for token in source.ids.tolist()]


def test_both_parts_are_tokenized_and_told_apart(folder: Path) -> None:
    prepared = run(folder)
    for part, documents in zip(("training", "heldout"), documents_of(config()), strict=True):
        assert documents
        text = prepared.tokenizer.decode(ids_of(prepared, part))
        assert text == "".join(f"<|endoftext|>{document.text}" for document in documents)
        assert getattr(prepared, part).bytes == sum(len(document.text) for document in documents)
    training, heldout = documents_of(config())
    rows = read_prompts(prepared.heldout_prompts)
    assert "".join(row.prompt + (row.response or "") for row in rows) == "".join(d.text for d in heldout)
    expected = train_tokenizer([document.text for document in training], 280)
    assert prepared.tokenizer.get_vocab() == expected.get_vocab()
    kinds = sorted(path.name.split("-")[0] for path in (folder / "data").iterdir())
    assert kinds == ["hashes.json", "heldout", "prepared.json", "prompts", "split", "tokenizer", "train"]
    assert prepared.amount == f"{len(ids_of(prepared, 'training')):,} tokens"


def test_nothing_is_made_or_read_again_until_something_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(folder)
    before = made_at(folder / "data")
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("read again")

        patch.setattr(SourceSection, "documents", refuse)
        again = run(folder)
    assert made_at(folder / "data") == before
    assert ids_of(again, "training") == ids_of(first, "training")

    def changes(data: DataConfig | None = None, tokenizer: TokenizerConfig = TRAIN_280) -> set[str]:
        """The kinds of folders that are made anew."""
        before = set(os.listdir(folder / "data"))
        run(folder, data, tokenizer)
        return {name.split("-")[0] for name in set(os.listdir(folder / "data")) - before}

    everything = {"split", "tokenizer", "train", "heldout", "prompts"}
    assert changes(config(0.3)) == everything
    smaller = TokenizerConfig.model_validate({"train": {"vocab_size": 270}})
    assert changes(config(0.3), smaller) == {"tokenizer", "train", "heldout"}
    assert changes(config(0.3, documents="joined"), smaller) == set()
    assert changes(config(0.3, shuffle_buffer=7), smaller) == set()
    assert changes(config(0.2), TRAIN_280) == everything
    (folder / "00.txt").write_text("changed, though the pattern did not\n")
    assert changes() == everything
    (folder / "00.txt").rename("99.txt")
    assert changes() == everything
    assert len(os.listdir(folder / "data")) == len(everything) + 2  # what is not used any more is gone


@pytest.mark.parametrize("kind", ["train", "heldout", "prompts", "tokenizer"])
def test_what_is_damaged_is_made_again(folder: Path, kind: str) -> None:
    expected = run(folder)
    [made] = (folder / "data").glob(f"{kind}-*")
    largest = max((path for path in made.iterdir()), key=lambda path: path.stat().st_size)
    largest.unlink()
    again = run(folder)
    assert largest.exists()
    assert ids_of(again, "training") == ids_of(expected, "training")
    largest.write_bytes(largest.read_bytes()[:-1])
    assert ids_of(run(folder), "training") == ids_of(expected, "training")


def test_weights_and_the_other_source_make_nothing_anew(folder: Path) -> None:
    sources = [{"kind": "text", "files": ["0*.txt"]}, {"kind": "text", "files": ["1*.txt"]}]
    heldout = [{"kind": "text", "files": ["11.txt"]}]
    tokenizer_of(folder)
    named = TokenizerConfig(name_or_path="mine")

    def made(*weights: float | None) -> set[str]:
        train = [
            source | ({} if weight is None else {"weight": weight})
            for source, weight in zip(sources, weights, strict=True)
        ]
        run(folder, config(heldout, train=train), named)
        return set(os.listdir(folder / "data"))

    assert made(None, None) == made(0.2, 0.8) == made(3, 1)
    before = made_at(folder / "data")
    (folder / "00.txt").write_text("another text of the first source\n" * 3)
    made(3, 1)
    after = made_at(folder / "data")
    kept = [name for name in after if before.get(name) == after[name] and name.startswith("train-")]
    assert len({name.split("/")[0] for name in kept}) == 1


def tokenizer_of(folder: Path, size: int = 280) -> Any:
    tokenizer = train_tokenizer(TEXTS, size)
    tokenizer.save_pretrained(folder / "mine")
    return tokenizer


def test_a_failure_leaves_nothing_that_looks_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_heldout", fail)
        with pytest.raises(RuntimeError, match="stop"):
            run(folder)
    assert not list((folder / "data").glob("prompts-*"))
    assert not list((folder / "data").glob(".*"))
    with pytest.raises(UserError, match="no prepared data"):
        run(folder, main=False)
    assert ids_of(run(folder), "training")


def test_the_other_processes_only_read(folder: Path) -> None:
    with pytest.raises(UserError, match="no prepared data"):
        run(folder, main=False)
    first = run(folder)
    before = made_at(folder / "data")
    other = run(folder, main=False)
    assert made_at(folder / "data") == before
    assert ids_of(other, "training") == ids_of(first, "training")
    assert other.heldout_prompts == first.heldout_prompts
    assert other.tokenizer.get_vocab() == first.tokenizer.get_vocab()


def test_a_pretrained_tokenizer_is_taken_as_it_is_and_its_change_is_seen(folder: Path) -> None:
    for size in (270, 275):
        mine = tokenizer_of(folder, size)
        prepared = run(folder, tokenizer=TokenizerConfig(name_or_path="mine"))
        assert prepared.tokenizer.get_vocab() == mine.get_vocab()
        texts = [document.text for document in documents_of(config())[0]]
        assert ids_of(prepared, "training") == [t for text in texts for t in (0, *mine.encode(text))]
    assert not list((folder / "data").glob("tokenizer-*"))


def test_a_cache_is_shared_by_runs_and_not_tidied(folder: Path) -> None:
    cached = config(cache_dir="cache")
    first = prepare(cached, TRAIN_280, folder / "one", join(), length=16)
    before = made_at(folder / "cache")
    second = prepare(cached, TRAIN_280, folder / "two", join(), length=8)
    assert made_at(folder / "cache") == before
    assert ids_of(first, "training") == ids_of(second, "training")
    assert os.listdir(folder / "one") == ["prepared.json"]
    prepare(config(0.3, cache_dir="cache"), TRAIN_280, folder / "one", join(), length=16)
    assert before.items() <= made_at(folder / "cache").items()
    (folder / "file").write_text("")
    with pytest.raises(UserError, match=r"file cannot be written .*; set data\.cache_dir to"):
        prepare(config(cache_dir="file"), TRAIN_280, folder / "one", join(), length=16)


def test_two_runs_may_fill_a_cache_at_the_same_time(tmp_path: Path) -> None:
    meet = threading.Barrier(2)
    folders: list[Path] = []

    def make(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "text").write_text("the same")
        meet.wait(10)

    def ask() -> None:
        folders.append(Cache(tmp_path).folder("thing", ["what decides it"], make))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders[0] == folders[1]
    assert [path.name for path in tmp_path.iterdir()] == [folders[0].name]
    assert (folders[0] / "inner" / "text").read_text() == "the same"
    assert json.loads((folders[0] / "made.json").read_text())["made_from"] == ["what decides it"]


SHORT = [{"kind": "jsonl", "files": ["short.jsonl"], "field": "t"}]


def test_too_little_is_told_with_the_numbers(folder: Path) -> None:
    tokenizer_of(folder)
    named = TokenizerConfig(name_or_path="mine")
    write_rows("short.jsonl", [{"t": "ab"}])
    with pytest.raises(UserError, match=r"'\*\.md' matches no file"):
        run(folder, config(train=[{"kind": "text", "files": ["*.md"]}]))
    with pytest.raises(
        UserError, match=r"data\.train\[0\]: \d+ tokens from \d+ documents.*length=4000 needs 4001"
    ):
        run(folder, tokenizer=named, length=4000)
    # A source without a row is no matter beside others, unless its weight asks for some.
    text = {"kind": "text", "files": ["*.txt"]}
    heldout = [{"kind": "text", "files": ["11.txt"]}]
    assert len(run(folder, config(heldout, train=[text, *SHORT]), named).training) > 0
    weighted = [text | {"weight": 1}, SHORT[0] | {"weight": 1}]
    with pytest.raises(UserError, match=r"data\.train\[1\]: \d tokens from 1 documents, but one row"):
        run(folder, config(heldout, train=weighted), named)


def test_documents_that_predict_nothing_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.data.encoding import TextEncoder

    plain = TextEncoder.__call__

    def without_begin(self: TextEncoder, documents: Any) -> Any:
        for encoded in plain(self, documents):
            yield type(encoded)(encoded.ids[1:2], None, 1)

    monkeypatch.setattr(TextEncoder, "__call__", without_begin)
    with pytest.raises(UserError, match=r"data\.train\[0\]: all \d+ documents are shorter than two tokens"):
        run(folder)


def test_examples_are_cut_and_said(folder: Path) -> None:
    tokenizer_of(folder)
    rows = [{"q": "ab", "a": "cd"}, {"q": "ab", "a": "x" * 60}, {"q": "y" * 60, "a": "ab"}]
    write_rows("pairs.jsonl", rows)
    pairs = [{"kind": "jsonl", "files": ["pairs.jsonl"], "pair": {"prompt": "q", "response": "a"}}]
    prepared = run(folder, config(pairs, train=pairs), TokenizerConfig(name_or_path="mine"))
    assert prepared.notes[0].startswith(
        "data.train[0]: 1 examples are longer than batch.length=16 and were cut"
    )
    assert "1 more left out" in prepared.notes[0]
    write_rows("pairs.jsonl", rows[2:])
    with pytest.raises(UserError, match="nothing is to be predicted in 1 examples"):
        run(folder, config(pairs, train=pairs), TokenizerConfig(name_or_path="mine"))
