"""Answers by a writer of a few lines: order, batches, ends at any time, other jobs, and what is skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from eval.journal import Journal, read_journals
from eval.questions import Answer, Continuation, Question, Request, Talk, Unanswerable
from eval.regenerate import TURNS, plan, regenerate
from layerskip_model.errors import UserError
from tests.chats import talk


class Killed(BaseException):
    """Stands for a signal."""


@dataclass
class Echo:
    """Answers with what was said last and the request's own number; ends after some batches; cannot answer "bad"."""

    batches_left: int = 1000
    job: dict[str, Any] = field(default_factory=lambda: {"model": "echo", "seed": 0})
    sizes: list[int] = field(default_factory=list)

    def write(self, requests: Sequence[Request], streams: Sequence[int]) -> list[Answer | Unanswerable]:
        if not self.batches_left:
            raise Killed
        self.batches_left -= 1
        self.sizes.append(len(requests))
        return [self.answer(request, stream) for request, stream in zip(requests, streams, strict=True)]

    def answer(self, request: Request, stream: int) -> Answer | Unanswerable:
        said = request["messages"][-1]["content"] if "messages" in request else request["prompt"]
        turn, row = divmod(stream, TURNS)
        return Unanswerable("it is bad") if said == "bad" else Answer(f"{said}! {row} {turn} é", "eos", 5)


QUESTIONS: list[Question] = [
    *(Talk(f"talk:{n}", talk(*["ask " * n, "old"] * (n % 3 + 1))) for n in range(1, 8)),
    Talk("talk:8", talk("bad", "old")),
    Talk("talk:9", []),
    Talk("talk:10", talk("good", "old", "bad", "old")),
]


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_rows_keep_their_order_and_their_random_numbers_in_any_batch(tmp_path: Path) -> None:
    for size in (1, 3, 100):
        manifest = regenerate(QUESTIONS, Echo(), tmp_path / f"{size}", batch_size=size)
        assert manifest is not None
        assert manifest["counts"] == {
            "questions": 10,
            "rows": 8,
            "tokens": 5 * (2 + 3 + 1 + 2 + 3 + 1 + 2 + 1),
            "answers_ended_by": {"eos": 15},
            "skipped": {"it is bad": 1, "nobody asks anything": 1},
        }
    texts = {(tmp_path / f"{size}" / "rows.jsonl").read_bytes() for size in (1, 3, 100)}
    assert len(texts) == 1
    rows = [json.loads(line) for line in texts.pop().splitlines()]
    assert [row["document"] for row in rows] == [f"talk:{n}" for n in (1, 2, 3, 4, 5, 6, 7, 10)]
    assert rows[1]["messages"] == talk(
        *(["ask ask ", "ask ask ! 1 0 é", "ask ask ", "ask ask ! 1 1 é", "ask ask ", "ask ask ! 1 2 é"])
    )
    assert rows[-1]["messages"] == talk("good", "good! 9 0 é")
    assert {path.name for path in (tmp_path / "1").iterdir()} == {"rows.jsonl", "manifest.json"}


@pytest.mark.parametrize("calls", range(1, 9))
def test_ended_after_any_batch_it_goes_on_to_the_same_files(calls: int, tmp_path: Path) -> None:
    regenerate(QUESTIONS, never := Echo(), tmp_path / "never", batch_size=2)
    place = tmp_path / "ended"
    with pytest.raises(Killed):
        regenerate(QUESTIONS, Echo(calls), place, batch_size=2)
    assert not (place / "rows.jsonl").exists()
    again = Echo()
    regenerate(QUESTIONS, again, place, batch_size=2)
    assert contents(place) == contents(tmp_path / "never")
    assert sum(again.sizes) < sum(never.sizes) or calls < 3  # a batch of three turns is done again as a whole


def test_a_line_that_was_cut_short_is_mended(tmp_path: Path) -> None:
    regenerate(QUESTIONS, Echo(), tmp_path / "never", batch_size=2)
    place = tmp_path / "ended"
    with pytest.raises(Killed):
        regenerate(QUESTIONS, Echo(7), place, batch_size=2)
    part = place / "parts" / "part-0.jsonl"
    known = part.read_bytes()
    assert known.count(b"\n") > 1
    for size in range(len(known) - 5, len(known), 2):
        part.write_bytes(known[:size])
        assert len(read_journals(place / "parts")) == known.count(b"\n") - 1
        assert part.read_bytes() == known[: known.rindex(b"\n", 0, -1) + 1]
    part.write_bytes(part.read_bytes() + b'{"batch": 9')
    regenerate(QUESTIONS, Echo(), place, batch_size=2)
    assert contents(place) == contents(tmp_path / "never")


def test_parts_of_any_number_of_processes_are_read(tmp_path: Path) -> None:
    for index, batch in ((0, 4), (3, 1), (0, 2)):
        Journal(tmp_path, index).add(batch, [f"é {batch}"])
    assert read_journals(tmp_path) == {4: ["é 4"], 2: ["é 2"], 1: ["é 1"]}
    (tmp_path / "part-1.jsonl").write_text("no JSON\n")
    with pytest.raises(UserError, match=r"part-1.jsonl' is damaged; start anew with --fresh"):
        read_journals(tmp_path)


@pytest.mark.parametrize("complete", [True, False])
def test_answers_of_another_job_are_not_mixed_in(complete: bool, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if complete:
        regenerate(QUESTIONS, Echo(), place, batch_size=2)
        assert regenerate(QUESTIONS, Echo(0), place, batch_size=2) is None
    else:
        with pytest.raises(Killed):
            regenerate(QUESTIONS, Echo(2), place, batch_size=2)
    other = Echo(job={"model": "echo", "seed": 1})
    for questions, writer, size, message in (
        (QUESTIONS, other, 2, "answers with seed 0, and this command has 1: .*or --fresh"),
        (QUESTIONS, Echo(job={"model": "echo"}), 2, "seed 0, and this command has None"),
        (QUESTIONS, Echo(), 4, "batch_size 2, and this command has 4"),
        (QUESTIONS[:-1], Echo(), 2, r"questions \w{12}\.\.\., and"),
    ):
        with pytest.raises(UserError, match=message):
            regenerate(questions, writer, place, batch_size=size)
    assert regenerate(QUESTIONS, other, place, batch_size=2, fresh=True) is not None
    assert regenerate(QUESTIONS, other, place, batch_size=2) is None


def test_what_was_lost_or_damaged_is_said(tmp_path: Path) -> None:
    regenerate(QUESTIONS, Echo(), tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"manifest.json and no rows.jsonl; start anew with --fresh"):
        regenerate(QUESTIONS, Echo(), tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json' is damaged; start anew"):
        regenerate(QUESTIONS, Echo(), tmp_path)


def test_nothing_to_learn_from_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row can be learnt from: 2 of 3 rows: the prompt is empty"):
        regenerate(
            [Continuation("a", ""), Continuation("b", "bad"), Continuation("c", " ")], Echo(), tmp_path
        )
    assert list(tmp_path.iterdir()) == []
    for questions, size, message in ((QUESTIONS, 0, "--batch_size 0"), ([], 1, "--num_samples 0")):
        with pytest.raises(UserError, match=message):
            regenerate(questions, Echo(), tmp_path, batch_size=size)


def test_batches_hold_questions_of_one_kind_the_longest_first() -> None:
    batches = plan(QUESTIONS, 3)
    assert sorted(index for batch in batches for index in batch) == list(range(10))
    sizes = [[QUESTIONS[index].size for index in batch] for batch in batches]
    assert sizes == [
        [(3, 20), (3, 8), (2, 28)],
        [(2, 16), (2, 4), (2, 4)],
        [(1, 24), (1, 12), (1, 3)],
        [(0, 0)],
    ]
