"""Answers by a model itself to the prompts of a data set: in batches, over processes, going on after any end."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eval.answer_writers import AnswerWriter
from eval.environment import command_line, git_revision, versions
from eval.journal import Done, Journal, read_journals
from eval.questions import Answer, Question, Unanswerable
from eval.ranks import ALONE, Ranks
from layerskip_model.errors import UserError
from layerskip_model.jsonl import write_rows

ROWS, MANIFEST, PARTS, JOB = "rows.jsonl", "manifest.json", "parts", "job.json"
SAY_EVERY = 10.0  # seconds
TURNS = 1 << 32  # streams of random numbers: the row's number + TURNS x the number of its answer


@dataclass
class Outcome:
    """What came of a question: a row to train on, or the reason why there is none."""

    row: dict[str, Any] | None = None
    skipped: str | None = None
    finish_reasons: list[str] = field(default_factory=list)
    tokens: int = 0


def regenerate(
    questions: Sequence[Question],
    writer: AnswerWriter,
    place: Path,
    *,
    about: dict[str, Any] | None = None,
    batch_size: int = 32,
    fresh: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Any] | None:
    """Answer all questions and leave `place`/rows.jsonl, in their order, and manifest.json; return the manifest.

    Killed at any time and called again it goes on, and rows.jsonl is the same byte by byte; what is complete is not
    done again (None). The batches do not depend on the number of processes. `about` stands in the manifest.

    To be called by every process of `ranks.together()`; they see the same directory, and the first gets the manifest.
    Raises UserError where answers of another writer or to other questions are there (and `fresh` does not delete
    them), and where no question has an answer.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: give 1 or more")
    if not questions:
        raise UserError("--num_samples 0: give 1 or more")
    job: dict[str, Any] = {}
    done: Done | None = None
    if ranks.is_first:
        job = writer.job | {"batch_size": batch_size, "questions": digest(questions)}
        job = json.loads(json.dumps(job))  # as it will be read again
        done = _begin(place, job, fresh)
    done = ranks.exchange(done)[0]
    if done is None:
        return None
    batches = plan(questions, batch_size)
    left = [number for number in range(len(batches)) if number not in done][ranks.index :: ranks.count]
    journal = Journal(place / PARTS, ranks.index)
    progress = Progress(sum(len(batches[number]) for number in left), ranks)
    for number in left:
        outcomes = answer([(index, questions[index]) for index in batches[number]], writer)
        journal.add(number, [asdict(one) for one in outcomes])
        progress.add(outcomes)
    ranks.exchange(None)
    return _finish(place, (about or {}) | {"job": job}, batches) if ranks.is_first else None


def answer(questions: Sequence[tuple[int, Question]], writer: AnswerWriter) -> list[Outcome]:
    """Ask numbered questions together, turn by turn until none has one more; what came of each."""
    answers: dict[int, list[Answer]] = {index: [] for index, _ in questions}
    skipped: dict[int, str] = {}
    asking = dict(questions)
    for turn in range(max(1, *(question.size[0] for question in asking.values()))):
        requests = {}
        for index, question in asking.items():
            try:
                requests[index] = question.request(answers[index])
            except Unanswerable as error:
                skipped[index] = str(error)
        wanted = {index: request for index, request in requests.items() if request is not None}
        streams = [index + TURNS * turn for index in wanted]
        asking = {}
        for index, found in zip(wanted, writer.write(list(wanted.values()), streams), strict=True):
            if isinstance(found, Answer):
                answers[index].append(found)
                asking[index] = dict(questions)[index]
            elif not answers[index]:  # else the row ends with the answers that it has
                skipped[index] = str(found)
    return [_outcome(question, answers[index], skipped.get(index)) for index, question in questions]


def _outcome(question: Question, answers: list[Answer], skipped: str | None) -> Outcome:
    outcome = Outcome(
        None, skipped, [one.finish_reason for one in answers], sum(one.tokens for one in answers)
    )
    if skipped is None:
        try:
            outcome.row = question.row(answers)
        except Unanswerable as error:
            outcome.skipped = str(error)
    return outcome


def plan(questions: Sequence[Question], size: int) -> list[list[int]]:
    """The questions' numbers in batches of the same number of turns and of similar length.

    The longest come first: what does not fit into the memory fails at once.
    """
    order = sorted(range(len(questions)), key=lambda index: (questions[index].size, -index), reverse=True)
    return [order[start : start + size] for start in range(0, len(order), size)]


def digest(questions: Sequence[Question]) -> str:
    """A hash over all that is asked, in order."""
    found = hashlib.sha256()
    for question in questions:
        found.update(json.dumps(asdict(question), sort_keys=True).encode() + b"\n")  # type: ignore[call-overload]
    return found.hexdigest()


@dataclass
class Progress:
    """Says now and then on standard error how far this process is; the first of a launch speaks for all."""

    rows: int
    ranks: Ranks

    def __post_init__(self) -> None:
        self._begin = self._said = time.monotonic()
        self._done = self._tokens = 0

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """These rows are done."""
        self._done += len(outcomes)
        self._tokens += sum(one.tokens for one in outcomes)
        now = time.monotonic()
        if self.ranks.is_first and (now - self._said >= SAY_EVERY or self._done == self.rows):
            self._said = now
            seconds = now - self._begin
            minutes, rest = divmod(round(seconds * (self.rows - self._done) / self._done), 60)
            whose = f"process 1 of {self.ranks.count}: " if self.ranks.count > 1 else ""
            print(
                f"{whose}{self._done:,} of {self.rows:,} rows, {self._tokens / seconds:,.0f} tokens/s, "
                f"{minutes}:{rest:02} left",
                file=sys.stderr,
            )


def _begin(place: Path, job: dict[str, Any], fresh: bool) -> Done | None:
    """The batches that are done; None where all is. Raises UserError for another job's answers."""
    parts = place / PARTS
    if fresh:
        shutil.rmtree(parts, ignore_errors=True)
        for name in (MANIFEST, ROWS):
            (place / name).unlink(missing_ok=True)
    for path in (place / MANIFEST, parts / JOB):
        if path.exists():
            _check_job(place, _read_job(path), job)
            if path.name == JOB:
                return read_journals(parts)
            if not (place / ROWS).exists():
                raise UserError(f"'{place}' has a {MANIFEST} and no {ROWS}; start anew with --fresh")
            shutil.rmtree(parts, ignore_errors=True)  # of a process that was killed at its very end
            return None
    parts.mkdir(parents=True, exist_ok=True)
    write_rows(parts / JOB, [{"job": job}])
    return {}


def _read_job(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"'{path}' is damaged; start anew with --fresh") from None


def _check_job(place: Path, known: dict[str, Any], job: dict[str, Any]) -> None:
    for key in job | known:
        if known.get(key) != job.get(key):
            raise UserError(
                f"--output_dir '{place}' has answers with {key} {_short(known.get(key))}, and this command has "
                f"{_short(job.get(key))}: give the same, another directory, or --fresh"
            )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _finish(place: Path, about: dict[str, Any], batches: list[list[int]]) -> dict[str, Any]:
    """Put the rows of all processes in order, with the manifest beside them."""
    done = read_journals(place / PARTS)
    found = {
        index: Outcome(**result)
        for number, batch in enumerate(batches)
        for index, result in zip(batch, done[number], strict=True)
    }
    outcomes = [found[index] for index in sorted(found)]
    rows = [one.row for one in outcomes if one.row is not None]
    skipped = Counter(one.skipped for one in outcomes if one.skipped is not None)
    if not rows:
        shutil.rmtree(place / PARTS)
        reason, number = skipped.most_common(1)[0]
        raise UserError(f"no row can be learnt from: {number} of {len(outcomes)} rows: {reason}; give others")
    write_rows(place / ROWS, rows)
    manifest = {
        "format": 1,
        **about,
        "counts": {
            "questions": len(outcomes),
            "rows": len(rows),
            "tokens": sum(one.tokens for one in outcomes),
            "answers_ended_by": Counter(reason for one in outcomes for reason in one.finish_reasons),
            "skipped": skipped,
        },
        "sha256": hashlib.sha256((place / ROWS).read_bytes()).hexdigest(),
        "command": command_line(),
        "versions": versions(),
        "revision": git_revision(),
    }
    temporary = place / f".{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(place / MANIFEST)
    shutil.rmtree(place / PARTS)
    return manifest
