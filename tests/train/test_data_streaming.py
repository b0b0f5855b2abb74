from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layerskip_model.errors import UserError
from layerskip_model.token_loss import IGNORE_INDEX
from tests.train.tiny_runs import launch_two
from tests.train.tiny_streams import SHAPE, FlakySource, new_batches, number_ids, source_rows
from tests.train.tiny_tokens import packed_documents
from train.data import stream_rows
from train.data.examples import Tolerance
from train.data.mixing import EpochOrder, SourceOrder
from train.data.packing import WindowRows
from train.data.stream_rows import RowShape, StreamState
from train.data.streaming import Mixer, RowSource, StoredRows, StreamedRows, part_of_state
from train.data.streams import SourceLost


def lists(row: dict[str, Any]) -> dict[str, list[int]]:
    return {key: values.tolist() for key, values in row.items()}


def reloaded(state: StreamState) -> StreamState:
    """Through a file, as a checkpoint keeps it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(params=[1, 7, 256], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(stream_rows, "_CHUNK_DOCUMENTS", request.param)
    return request.param


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("end", [0, 1])
def test_without_shuffling_a_stream_has_the_rows_of_a_file(tmp_path: Path, separate: bool, end: int) -> None:
    shape = RowShape(8, separate, end)
    packed = packed_documents(tmp_path, [number_ids(n) for n in range(50)] * 2, end=end)  # two passes
    expected = WindowRows(packed, 8, separate=separate)
    rows = source_rows(FlakySource(), buffer=1, shape=shape)
    assert [lists(next(rows)) for _ in range(len(expected))] == [
        lists(expected[i]) for i in range(len(expected))
    ]


@pytest.mark.parametrize("whole", [False, True])
def test_a_stream_goes_on_after_any_row(whole: bool) -> None:
    rows = source_rows(FlakySource(whole=whole))
    expected = [lists(next(rows)) for _ in range(90)]
    rows = source_rows(FlakySource(whole=whole))
    for index in range(90):
        if index % 7 == 0:
            rows = source_rows(FlakySource(whole=whole), state=reloaded(rows.snapshot()()))
        assert lists(next(rows)) == expected[index]


def test_a_snapshot_is_of_its_moment() -> None:
    rows = source_rows(FlakySource())
    next(rows)
    snapshot = rows.snapshot()
    expected = [lists(next(rows)) for _ in range(30)]
    again = source_rows(FlakySource(), state=snapshot())
    assert [lists(next(again)) for _ in range(30)] == expected


def test_shuffling_is_seeded_and_within_the_buffer() -> None:
    plain = source_rows(FlakySource(), buffer=1)
    order = [json.dumps(lists(next(plain))) for _ in range(60)]

    def shuffled(seed: int) -> list[str]:
        rows = source_rows(FlakySource(), buffer=10, seed=seed)
        return [json.dumps(lists(next(rows))) for _ in range(40)]

    assert shuffled(0) == shuffled(0)
    assert shuffled(0) != shuffled(1)
    for place, row in enumerate(shuffled(0)):
        assert row in order[: place + 10]  # none from farther ahead
    assert sum(order.index(row) != place for place, row in enumerate(shuffled(0))) > 20


def test_whole_examples_are_not_cut_and_all_come(capsys: pytest.CaptureFixture[str]) -> None:
    rows = source_rows(FlakySource(number=30, whole=True), buffer=1)
    seen: list[list[int]] = []
    for _ in range(60):
        row = lists(next(rows))
        begins = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for a, b in zip(begins, [*begins[1:], None], strict=True):
            labels = [label for label in row["labels"][a:b] if label != IGNORE_INDEX]
            if labels:
                assert row["input_ids"][a] == 0
                seen.append(labels)
    long = max(len(number_ids(n)) for n in range(30))
    expected = [number_ids(n)[2:9] for n in range(30)]
    assert long > 9
    assert all(seen.count(labels) >= 1 for labels in expected)
    assert all(labels in expected for labels in seen)
    captured = capsys.readouterr().err
    assert captured.count("longer than batch.length=8") == 1


def test_a_stream_begins_again_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    source = FlakySource(number=4)
    rows = source_rows(source)
    for _ in range(30):
        next(rows)
    assert source.opened > 3
    assert capsys.readouterr().err.count("data.train[0]: the stream is at its end and begins again") == 1


def test_a_stream_of_empty_documents_is_refused() -> None:
    rows = source_rows(FlakySource(number=4))
    rows.encode = lambda documents: iter([])  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"data\.train\[0\]: all documents are shorter than two tokens"):
        next(rows)


def test_a_stream_of_examples_that_are_all_prompt_is_refused_and_not_read_for_ever() -> None:
    rows = source_rows(FlakySource(number=4, whole=True), shape=RowShape(1, True, 1))  # the first two ids
    with pytest.raises(UserError, match=r"data\.train\[0\]: .* without anything to predict"):
        next(rows)


def step_rows(batches: Any) -> list[Any]:
    return [[lists(micro) for micro in step] for step in batches]


def test_stopped_and_resumed_equals_never_stopped() -> None:
    whole = step_rows(new_batches(FlakySource(), start=0, stop=6))
    first = new_batches(FlakySource(), start=0, stop=6)
    seen = []
    for _, step in zip(range(3), first, strict=False):  # left while the reader is steps ahead
        seen.append([lists(micro) for micro in step])
    state = first.state()
    assert state is not None
    resumed = new_batches(FlakySource(), start=3, stop=6, state=reloaded(state))
    assert seen + step_rows(resumed) == whole
    assert [micro["row"] for micro in whole[0]] == [[0, 1], [2, 3], [4]]


def test_a_lost_source_ends_the_run_after_its_steps_and_the_state_goes_on() -> None:
    whole = step_rows(new_batches(FlakySource(), start=0, stop=12))
    batches = new_batches(FlakySource(gone_after=40), start=0, stop=12)
    seen: list[Any] = []
    with pytest.raises(SourceLost, match="lost after 40 documents"):
        seen.extend([lists(micro) for micro in step] for step in batches)
    assert seen == whole[: len(seen)]
    state = batches.state()
    if not seen:  # the first chunk could not be read
        assert state is None
    else:
        assert len(seen) < 12
        assert state is not None
        rest = new_batches(FlakySource(), start=len(seen), stop=12, state=reloaded(state))
        assert step_rows(rest) == whole[len(seen) :]


def test_another_error_is_not_hidden() -> None:
    def fail() -> Mixer:
        raise ZeroDivisionError("broken")

    batches = new_batches(FlakySource(), start=0, stop=2)
    batches.open_mixer = fail
    with pytest.raises(ZeroDivisionError, match="broken"):
        next(iter(batches))


def mixer_of(directory: Path, state: StreamState | None = None) -> Mixer:
    """A stream, and rows on disk whose tokens are beyond the stream's."""
    stored = WindowRows(packed_documents(directory, [range(100, 164)]), SHAPE.length, separate=True)
    streamed = source_rows(FlakySource(), state=part_of_state(state, 0))
    place = int(state["rows"]) if state else 0
    sources: list[RowSource] = [StreamedRows(streamed), StoredRows(stored, EpochOrder(len(stored), 0, 1))]
    return Mixer(sources, [0.6, 0.4], 0, place, Tolerance())


def test_a_stream_is_mixed_with_rows_on_disk_by_weight(tmp_path: Path) -> None:
    columns, _ = mixer_of(tmp_path).take(50)
    sources, before = SourceOrder([0.6, 0.4], 0)(np.arange(50))
    assert ((columns["input_ids"].max(axis=1) >= 100) == (sources == 1)).all()
    assert abs((sources == 1).sum() - 20) <= 1
    stored = WindowRows(packed_documents(tmp_path / "again", [range(100, 164)]), 8, separate=True)
    order = EpochOrder(len(stored), 0, 1)
    for place in np.flatnonzero(sources == 1).tolist():
        row = stored[int(order(before[place : place + 1])[0])]
        assert columns["input_ids"][place].tolist() == row["input_ids"].tolist()

    mixer = mixer_of(tmp_path)
    first, snapshot = mixer.take(20)
    second, _ = mixer_of(tmp_path, reloaded(snapshot())).take(30)
    for key, values in columns.items():
        assert (np.concatenate([first[key], second[key]]) == values).all()


@pytest.mark.parametrize("chunk", [7], indirect=True)
def test_two_processes_get_the_rows_of_one(tmp_path: Path, chunk: int) -> None:
    launched = launch_two("tests.train.stream_worker", str(tmp_path))
    _, errors = launched.communicate(timeout=120)
    assert launched.returncode == 0, errors
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    def together(name: str) -> list[list[Any]]:
        """Each step's rows, by their index in the global batch, with the empty micro-batches left out."""
        steps = []
        for parts in zip(*(rank[name] for rank in ranks), strict=True):
            rows: dict[int, Any] = {}
            assert len({len(part) for part in parts}) == 1
            for micro in (micro for part in parts for micro in part):
                for i, row in enumerate(micro["row"]):
                    values = {key: micro[key][i] for key in ("input_ids", "labels", "position_ids")}
                    if any(label != IGNORE_INDEX for label in values["labels"]):
                        assert row not in rows
                        rows[row] = values
            steps.append([rows[row] for row in range(5)])
        return steps

    alone = source_rows(FlakySource())
    expected = [[lists(next(alone)) for _ in range(5)] for _ in range(6)]
    assert together("whole") == expected
    assert together("halves") == expected
    before = together("before the loss")
    assert 0 < len(before) < 6
    assert before == expected[: len(before)]
    assert [rank["lost"] for rank in ranks] == ["lost after 30 documents"] * 2
