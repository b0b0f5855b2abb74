from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from layerskip_model.errors import UserError
from train.data import packing
from train.data.packing import (
    IGNORE_INDEX,
    PackedDataset,
    PackedTokens,
    StepBatches,
    evaluation_batches,
    rows_of_step,
)
from train.data.sources import Document
from train.data.tokenizer import train_tokenizer

DOCUMENTS = [Document(f"{i}", f"def f{i}(x):\n    return x + {i}  # é\n") for i in range(30)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([document.text for document in DOCUMENTS], 270)


def stream_of(tmp_path: Path, tokens: int) -> PackedTokens:
    """A stream 0, 1, 2, ... so that every token tells where it stands."""
    path = tmp_path / "stream.bin"
    np.arange(tokens, dtype=np.uint16).tofile(path)
    return PackedTokens(path, "uint16", tokens, 1, tokens)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_stream_is_eos_and_document_in_turn(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", batch)
    packed = packing.tokenize(iter(DOCUMENTS), tokenizer, tmp_path / "new" / "train.bin")
    expected: list[int] = []
    for document in DOCUMENTS:
        expected += [0, *tokenizer.encode(document.text)]
    assert packed.array().tolist() == expected
    assert (packed.dtype, packed.tokens, packed.documents) == ("uint16", len(expected), 30)
    assert packed.bytes == len("".join(document.text for document in DOCUMENTS).encode())
    assert PackedTokens.open(packed.path) == packed
    assert sorted(entry.name for entry in packed.path.parent.iterdir()) == ["train.bin", "train.bin.json"]


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([document.text for document in DOCUMENTS], 270)
    tokenizer.add_tokens([f"<{i}>" for i in range(2**16 - len(tokenizer))])
    document = Document("a", f"x<{2**16 - 271}>")
    small = packing.tokenize([document], tokenizer, tmp_path / "small.bin")
    assert (small.dtype, small.array()[-1]) == ("uint16", 2**16 - 1)
    tokenizer.add_tokens(["<large>"])
    large = packing.tokenize([Document("a", "x<large>")], tokenizer, tmp_path / "large.bin")
    assert (large.dtype, large.array()[-1]) == ("uint32", 2**16)


def test_a_failed_tokenize_leaves_the_old_stream(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    old = packing.tokenize(DOCUMENTS[:2], tokenizer, tmp_path / "a.bin")

    def broken() -> Iterator[Document]:
        yield from DOCUMENTS
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        packing.tokenize(broken(), tokenizer, tmp_path / "a.bin")
    assert PackedTokens.open(old.path) == old
    assert len(list(tmp_path.iterdir())) == 2


def test_a_stream_of_another_length_does_not_open(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    packed = packing.tokenize(DOCUMENTS, tokenizer, tmp_path / "a.bin")
    packed.path.write_bytes(packed.path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="does not hold"):
        PackedTokens.open(packed.path)


def test_the_progress_bar_shows_only_for_slow_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, shown in ((60.0, False), (-1.0, True)):
        monkeypatch.setattr(packing, "_QUIET_SECONDS", seconds)
        monkeypatch.setenv("FORCE_COLOR", "1")
        with packing.slow_progress("tokenizing", 10) as advance:
            advance(3)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert bool(captured.err) == shown


@pytest.mark.parametrize("length", [1, 4, 5, 10])
@pytest.mark.parametrize("tokens", [11, 12, 20, 21])
def test_windows_predict_every_token_once(tmp_path: Path, tokens: int, length: int) -> None:
    packed = stream_of(tmp_path, tokens)
    training, evaluation = PackedDataset(packed, length), PackedDataset(packed, length, keep_last=True)
    for dataset, predicted in ((training, (tokens - 1) // length * length), (evaluation, tokens - 1)):
        pairs = []
        for i in range(len(dataset)):
            row = dataset[i]
            assert row["input_ids"].shape == row["labels"].shape == (length,)
            assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
            pairs += list(zip(row["input_ids"].tolist(), row["labels"].tolist(), strict=True))
        assert [pair for pair in pairs if pair[1] != IGNORE_INDEX] == [(i, i + 1) for i in range(predicted)]
        assert all(pair[0] == 0 for pair in pairs[predicted:])  # filled up with the stream's first token, eos
    with pytest.raises(IndexError):
        training[len(training)]


def test_too_few_tokens_are_told_with_the_numbers(tmp_path: Path) -> None:
    assert len(PackedDataset(stream_of(tmp_path, 9), 8)) == 1
    with pytest.raises(UserError, match=r"8 tokens from 1 documents.*batch\.length=8 needs 9"):
        PackedDataset(stream_of(tmp_path, 8), 8)
    assert len(PackedDataset(stream_of(tmp_path, 2), 8, keep_last=True)) == 1
    with pytest.raises(UserError, match="needs 2"):
        PackedDataset(stream_of(tmp_path, 1), 8, keep_last=True)


@pytest.mark.parametrize(("batch", "num_rows"), [(3, 10), (10, 10), (4, 12), (25, 10), (1, 1)])
def test_rows_of_step_equals_a_loop_over_epochs(batch: int, num_rows: int) -> None:
    steps = 20
    sequence: list[int] = []
    epoch = 0
    while len(sequence) < steps * batch:
        sequence += np.random.default_rng([7, epoch]).permutation(num_rows).tolist()
        epoch += 1
    for step in reversed(range(steps)):  # no state: any order of asking gives the same
        assert rows_of_step(step, batch, num_rows, 7) == sequence[step * batch : (step + 1) * batch]


def test_every_epoch_is_another_permutation() -> None:
    rows = [row for step in range(6) for row in rows_of_step(step, 25, 50, seed=0)]
    epochs = [rows[:50], rows[50:100], rows[100:]]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows_of_step(0, 25, 50, seed=1) != rows[:25]


@pytest.mark.parametrize("world", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("micro", [1, 2, 3, 100])
def test_the_ranks_batches_together_are_the_global_batch(tmp_path: Path, world: int, micro: int) -> None:
    dataset = PackedDataset(stream_of(tmp_path, 101), 4)
    ranks = [list(StepBatches(dataset, 8, micro, 0, 2, 7, rank, world)) for rank in range(world)]
    for index, step in enumerate(range(2, 7)):
        batches = [rank[index] for rank in ranks]
        assert len({len(batch) for batch in batches}) == 1
        sizes = [
            sum(len(m["row"]) for m in batch if (m["labels"] != IGNORE_INDEX).any()) for batch in batches
        ]
        assert max(sizes) - min(sizes) <= 1
        seen = []
        for micro_batch in (m for batch in batches for m in batch):
            assert 1 <= len(micro_batch["row"]) <= micro
            if (micro_batch["labels"] != IGNORE_INDEX).any():
                seen += micro_batch["row"].tolist()
            for i, row in enumerate(micro_batch["row"].tolist()):
                expected = dataset[rows_of_step(step, 8, len(dataset), 0)[row]]
                assert torch.equal(micro_batch["input_ids"][i], expected["input_ids"])
                assert micro_batch["labels"][i].tolist() in (expected["labels"].tolist(), [IGNORE_INDEX] * 4)
        assert seen == list(range(8))  # contiguous parts, in the order of the ranks


def test_a_resumed_run_sees_the_same_batches(tmp_path: Path) -> None:
    dataset = PackedDataset(stream_of(tmp_path, 50), 4)
    whole = list(StepBatches(dataset, 4, 2, 3, 0, 9))
    resumed = list(StepBatches(dataset, 4, 2, 3, 5, 9))
    assert len(StepBatches(dataset, 4, 2, 3, 5, 9)) == len(resumed) == 4
    for before, after in zip(whole[5:], resumed, strict=True):
        for left, right in zip(before, after, strict=True):
            assert all(torch.equal(left[key], right[key]) for key in ("input_ids", "labels", "row"))


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_evaluation_covers_every_token_once_on_any_number_of_ranks(tmp_path: Path, world: int) -> None:
    dataset = PackedDataset(stream_of(tmp_path, 24), 4, keep_last=True)  # 6 rows, the last one short
    ranks = [list(evaluation_batches(dataset, 2, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    labels = torch.cat([batch["labels"].flatten() for batches in ranks for batch in batches])
    assert labels[labels != IGNORE_INDEX].tolist() == list(range(1, 24))
