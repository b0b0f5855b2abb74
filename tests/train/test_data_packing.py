from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_model.token_loss import IGNORE_INDEX
from tests.train.tiny_tokens import END, packed_documents, packed_examples
from train.data.batches import StepBatches, cut_for_rank, evaluation_batches
from train.data.mixing import EpochOrder
from train.data.packing import ExampleRows, JoinedRows, Rows, WindowRows, best_fit


def stream_of(directory: Path, tokens: int) -> WindowRows:
    """One document of tokens 0, 1, 2, ..., so that each tells where it stands, in windows of 4."""
    return WindowRows(packed_documents(directory, [range(tokens)]), 4, separate=False)


@pytest.mark.parametrize("length", [1, 4, 5, 10])
@pytest.mark.parametrize("tokens", [11, 12, 20, 21])
def test_windows_predict_every_token_once(tmp_path: Path, tokens: int, length: int) -> None:
    packed = packed_documents(tmp_path, [range(tokens)])
    training = WindowRows(packed, length, separate=False)
    evaluation = WindowRows(packed, length, separate=False, keep_last=True)
    for dataset, predicted in ((training, (tokens - 1) // length * length), (evaluation, tokens - 1)):
        pairs = []
        for i in range(len(dataset)):
            row = dataset[i]
            assert set(row) == {"input_ids", "labels"}
            assert row["input_ids"].shape == row["labels"].shape == (length,)
            assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
            pairs += list(zip(row["input_ids"].tolist(), row["labels"].tolist(), strict=True))
        assert [pair for pair in pairs if pair[1] != IGNORE_INDEX] == [(i, i + 1) for i in range(predicted)]
        assert len(pairs) == len(dataset) * length
        assert dataset.predicted == predicted
    with pytest.raises(IndexError):
        training[len(training)]


def naive_separate_windows(
    documents: list[list[int]], length: int, keep_last: bool
) -> list[list[tuple[int, int, int]]]:
    """(input, label, position) of every place of every window, token by token."""
    tokens = [(token, place) for document in documents for place, token in enumerate(document)]
    windows = []
    for begin in range(0, len(tokens) - 1, length):
        row, position = [], 0
        for i in range(begin, min(begin + length, len(tokens) - 1)):
            token, place = tokens[i]
            position = 0 if place == 0 or i == begin else position + 1
            label, begins = tokens[i + 1][0], tokens[i + 1][1] == 0
            row.append((token, IGNORE_INDEX if begins and label != END else label, position))
        fill = length - len(row)
        if not fill or keep_last:
            windows.append(row + [(row[0][0], IGNORE_INDEX, i) for i in range(fill)])
    return windows


bodies = st.lists(st.lists(st.integers(2, 60), min_size=1, max_size=9), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(bodies, st.booleans(), st.integers(1, 12), st.booleans())
def test_separate_windows_restart_positions_and_predict_no_other_document(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[list[int]],
    shared_end: bool,
    length: int,
    keep_last: bool,
) -> None:
    documents = [[END, *text] if shared_end else [0, *text, END] for text in texts]
    packed = packed_documents(tmp_path_factory.mktemp("packed"), documents)
    rows = WindowRows(packed, length, separate=True, keep_last=keep_last)
    expected = naive_separate_windows(documents, length, keep_last)
    assert as_places(rows) == expected
    assert rows.predicted == sum(label != IGNORE_INDEX for row in expected for _, label, _ in row)


def as_places(rows: Rows) -> list[list[tuple[int, int, int]]]:
    names = ("input_ids", "labels", "position_ids")
    return [list(zip(*(rows[i][name].tolist() for name in names), strict=True)) for i in range(len(rows))]


examples_of = st.lists(
    st.lists(st.tuples(st.integers(2, 60), st.booleans()), min_size=1, max_size=14), min_size=1, max_size=20
)


@settings(max_examples=80, deadline=None)
@given(examples_of, st.integers(1, 12))
def test_examples_are_never_cut_over_two_rows(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[list[tuple[int, bool]]], length: int
) -> None:
    examples = [([0, *(t for t, _ in body)], [False, *(c for _, c in body)]) for body in bodies]
    rows = ExampleRows(packed_examples(tmp_path_factory.mktemp("packed"), examples), length, separate=True)
    expected, cut, left_out = [], 0, 0
    for ids, counted in examples:
        places = [
            (ids[i], ids[i + 1] if counted[i + 1] else IGNORE_INDEX, i)
            for i in range(min(length, len(ids) - 1))
        ]
        if any(label != IGNORE_INDEX for _, label, _ in places):
            expected.append(places)
            cut += len(ids) - 1 > length
        else:
            left_out += 1
    found = []
    for row in as_places(rows):
        assert len(row) == length
        begins = [i for i, (_, _, position) in enumerate(row) if position == 0]
        pieces = [row[a:b] for a, b in zip(begins, [*begins[1:], None], strict=True)]
        if all(label == IGNORE_INDEX for _, label, _ in pieces[-1]):
            assert {token for token, _, _ in pieces.pop()} == {row[0][0]}  # what fills the row
        found += pieces
    assert sorted(found) == sorted(expected)
    assert (rows.cut, rows.left_out) == (cut, left_out)
    assert rows.predicted == sum(label != IGNORE_INDEX for row in expected for _, label, _ in row)


def test_joined_examples_have_no_positions(tmp_path: Path) -> None:
    packed = packed_examples(tmp_path, [([0, 5, 6], [False, True, True]), ([0, 7], [False, True])])
    row = ExampleRows(packed, 4, separate=False)[0]
    assert {name: values.tolist() for name, values in row.items()} == {
        "input_ids": [0, 5, 0, 0],
        "labels": [5, 6, 7, IGNORE_INDEX],
    }


def test_the_bytes_of_cut_examples_are_those_of_what_is_left(tmp_path: Path) -> None:
    packed = packed_examples(tmp_path, [([0] * 9, [False] + [True] * 8), ([0] * 3, [False, True, True])])
    assert ExampleRows(packed, 8, separate=True).bytes == packed.bytes == 20
    assert ExampleRows(packed, 3, separate=True).bytes == 10  # 5 of 10 predicted tokens


def naive_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """The room that is left in each bin, by looking at all of them each time."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60))
def test_best_fit_equals_a_search_through_all_bins(sizes: list[int]) -> None:
    bins = best_fit(np.array(sizes, dtype=np.int64), 30)
    assert sorted(thing for things in bins for thing in things) == list(range(len(sizes)))
    assert sorted(30 - sum(sizes[thing] for thing in things) for things in bins) == naive_best_fit(sizes, 30)


def test_sources_rows_stand_one_after_the_other(tmp_path: Path) -> None:
    parts = [stream_of(tmp_path / str(tokens), tokens) for tokens in (9, 3, 14)]
    joined = JoinedRows(parts)
    expected = [part[i]["labels"].tolist() for part in parts for i in range(len(part))]
    assert [joined[i]["labels"].tolist() for i in range(len(joined))] == expected
    assert (joined.predicted, joined.bytes) == (8 + 0 + 12, 30)
    with pytest.raises(IndexError):
        joined[len(joined)]


@pytest.mark.parametrize("world", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("micro", [1, 2, 3, 100])
def test_the_ranks_batches_together_are_the_global_batch(tmp_path: Path, world: int, micro: int) -> None:
    dataset = stream_of(tmp_path, 101)
    order = EpochOrder(len(dataset), 0)
    ranks = [list(StepBatches(dataset, order, 8, micro, 2, 7, rank, world)) for rank in range(world)]
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
                expected = dataset[int(order(np.array([step * 8 + row]))[0])]
                assert torch.equal(micro_batch["input_ids"][i], expected["input_ids"])
                assert micro_batch["labels"][i].tolist() in (expected["labels"].tolist(), [IGNORE_INDEX] * 4)
        assert seen == list(range(8))  # contiguous parts, in the order of the ranks


def test_a_resumed_run_sees_the_same_batches(tmp_path: Path) -> None:
    dataset = stream_of(tmp_path, 50)
    whole = list(StepBatches(dataset, EpochOrder(len(dataset), 3), 4, 2, 0, 9))
    resumed = list(StepBatches(dataset, EpochOrder(len(dataset), 3), 4, 2, 5, 9))
    assert len(resumed) == 4
    for before, after in zip(whole[5:], resumed, strict=True):
        for left, right in zip(before, after, strict=True):
            assert all(torch.equal(left[key], right[key]) for key in ("input_ids", "labels", "row"))


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_evaluation_covers_every_token_once_on_any_number_of_ranks(tmp_path: Path, world: int) -> None:
    packed = packed_documents(tmp_path, [range(24)])
    dataset = WindowRows(packed, 4, separate=False, keep_last=True)  # 6 rows, the last one short
    ranks = [list(evaluation_batches(dataset, 2, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    labels = torch.cat([batch["labels"].flatten() for batches in ranks for batch in batches])
    assert labels[labels != IGNORE_INDEX].tolist() == list(range(1, 24))


def test_no_rank_has_fewer_micro_batches_than_another() -> None:
    for world in range(1, 7):
        parts = [cut_for_rank(7, 2, rank, world) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert [row for part in parts for rows in part for row in rows] == list(range(7))
