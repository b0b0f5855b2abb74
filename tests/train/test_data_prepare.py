from __future__ import annotations

from pathlib import Path

import pytest

from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_prompts
from train.data import prepare as prepare_module
from train.data.prepare import PreparedData, prepare
from train.data.sources import DataConfig, split_documents
from train.data.tokenizer import TokenizerConfig, train_tokenizer

TRAIN_280 = TokenizerConfig.model_validate({"train": {"vocab_size": 280}})


class OneProcess:
    def __init__(self, main: bool = True) -> None:
        self.is_main_process = main
        self.waited = 0

    def wait_for_everyone(self) -> None:
        self.waited += 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        Path(f"{i:02}.txt").write_text(f"def f{i}():\n    return {i}\n" * 3)
    return tmp_path


def config(heldout: float = 0.2) -> DataConfig:
    return DataConfig.model_validate({"train": [{"kind": "text", "files": ["*.txt"]}], "heldout": heldout})


def run(
    folder: Path, data: DataConfig | None = None, tokenizer: TokenizerConfig = TRAIN_280, main: bool = True
) -> PreparedData:
    processes = OneProcess(main)
    try:
        return prepare(data or config(), tokenizer, folder / "data", processes)
    finally:
        assert processes.waited == 1  # also when something failed, or the others would wait for ever


def made_at(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "data").iterdir() if path.is_file()}


def test_both_parts_are_tokenized_and_told_apart(folder: Path) -> None:
    prepared = run(folder)
    training, heldout = (list(part) for part in split_documents(config()))
    for packed, documents in ((prepared.train, training), (prepared.heldout, heldout)):
        assert packed.documents == len(documents) > 0
        text = prepared.tokenizer.decode(packed.array().tolist())
        assert text == "".join(f"<|endoftext|>{document.text}" for document in documents)
    rows = read_prompts(prepared.heldout_rows)
    assert "".join(row.prompt + (row.response or "") for row in rows) == "".join(d.text for d in heldout)
    expected = train_tokenizer([document.text for document in training], 280)
    assert prepared.tokenizer.get_vocab() == expected.get_vocab()
    names = {
        "train.bin",
        "train.bin.json",
        "heldout.bin",
        "heldout.bin.json",
        "heldout.jsonl",
        "prepared.json",
    }
    assert set(made_at(folder)) == names


def test_files_are_reused_until_something_changes(folder: Path) -> None:
    first = run(folder)
    before = made_at(folder)
    again = run(folder)
    assert made_at(folder) == before
    assert (again.train, again.heldout) == (first.train, first.heldout)

    def rebuilds(data: DataConfig | None = None, tokenizer: TokenizerConfig = TRAIN_280) -> bool:
        before = made_at(folder)
        run(folder, data, tokenizer)
        return made_at(folder)["prepared.json"] != before["prepared.json"]

    assert rebuilds(config(0.3))
    assert rebuilds(config(0.3), TokenizerConfig.model_validate({"train": {"vocab_size": 270}}))
    (folder / "00.txt").write_text("changed, though the pattern did not\n")
    assert rebuilds()
    (folder / "00.txt").rename("99.txt")
    assert rebuilds()
    for made in ("train.bin", "heldout.bin.json", "heldout.jsonl", "tokenizer/tokenizer.json"):
        (folder / "data" / made).unlink()
        assert rebuilds()
    assert not rebuilds()


def test_a_change_of_text_alone_is_seen(folder: Path) -> None:
    for name in ("train", "heldout"):
        Path(f"{name}.md").write_text("before, and as long\n")
    parts = {key: [{"kind": "text", "files": [f"{key}.md"]}] for key in ("train", "heldout")}
    data = DataConfig.model_validate(parts)
    run(folder, data)
    for name in ("train", "heldout"):
        Path(f"{name}.md").write_text("after!, and as long\n")
        prepared = run(folder, data)
        text = prepared.tokenizer.decode(getattr(prepared, name).array().tolist())
        assert text == "<|endoftext|>after!, and as long\n"


def test_a_rebuild_that_fails_leaves_nothing_that_looks_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder)

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_heldout", fail)
        with pytest.raises(RuntimeError, match="stop"):
            run(folder, config(0.3))
    with pytest.raises(UserError, match="no prepared data"):
        run(folder, main=False)
    assert run(folder).train.documents == len(list(split_documents(config())[0]))


def test_the_other_processes_only_read(folder: Path) -> None:
    with pytest.raises(UserError, match="no prepared data"):
        run(folder, main=False)
    first = run(folder)
    before = made_at(folder)
    other = run(folder, main=False)
    assert made_at(folder) == before
    assert (other.train, other.heldout_rows) == (first.train, first.heldout_rows)
    assert other.tokenizer.get_vocab() == first.tokenizer.get_vocab()


def test_a_pretrained_tokenizer_is_taken_as_it_is_and_its_change_is_seen(folder: Path) -> None:
    for size in (270, 275):
        mine = train_tokenizer(["def f():\n    return 1\n" * 9], size)
        mine.save_pretrained("mine")
        prepared = run(folder, tokenizer=TokenizerConfig(name_or_path="mine"))
        assert prepared.tokenizer.get_vocab() == mine.get_vocab()
        texts = [document.text for document in split_documents(config())[0]]
        assert prepared.train.array().tolist() == [t for text in texts for t in (0, *mine.encode(text))]
    assert not (folder / "data" / "tokenizer").exists()


def test_unusable_sources_are_told(folder: Path) -> None:
    missing = DataConfig.model_validate({"train": [{"kind": "text", "files": ["*.md"]}]})
    with pytest.raises(UserError, match=r"'\*\.md' matches no file"):
        run(folder, missing)
