"""How far and how fast: on a terminal, elsewhere, and as numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.text import Text

from train import progress as module
from train.config import LogConfig
from train.log import RunLog
from train.progress import StepProgress, peak_memory, track

METRICS = {
    "loss": 2.5,
    "tokens_per_second": 12345.6,
    "learning_rate": 0.00123,
    "gradient_norm": 0.537,
    "mfu": 0.414,
    "peak_memory_bytes": 12.3e9,
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def new_log(directory: Path, *, active: bool = True) -> RunLog:
    return RunLog(directory, LogConfig(), {}, active=active)


def log_on_terminal(directory: Path, monkeypatch: pytest.MonkeyPatch) -> RunLog:
    """The log of a terminal of 80 columns."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    return new_log(directory)


def test_without_a_terminal_there_is_a_line_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with StepProgress(new_log(tmp_path), start=10, total=20) as progress:
        for step in range(11, 21):
            clock.now += 4.0
            progress.count(100)
            if step == 16:
                metrics = {"loss": 2.0, "learning_rate": 0.01} | progress.measure(step)
                progress.report(metrics | {"peak_memory_bytes": 2e9}, "exits 1-3")
            progress.advance(step)
    # every third step, as ten seconds have gone by, and the last
    assert capsys.readouterr().err.splitlines() == [
        "step 13/20  0:28 left",
        "step 16/20  loss 2.000  25 tok/s  0:16 left  lr 0.01  2 GB  exits 1-3",
        "step 19/20  loss 2.000  25 tok/s  0:04 left  lr 0.01  2 GB  exits 1-3",
        "step 20/20  loss 2.000  25 tok/s  0:00 left  lr 0.01  2 GB  exits 1-3",
    ]


def test_the_speed_is_that_of_training_since_the_last_time(tmp_path: Path, clock: Clock) -> None:
    progress = StepProgress(new_log(tmp_path), start=3, total=9)
    speeds = []
    for step, tokens, seconds, beside in ((4, 100, 2.0, 50.0), (5, 60, 1.0, 0.0), (6, 90, 3.0, 1.0)):
        clock.now += seconds
        progress.count(tokens)
        if step > 4:
            measured = progress.measure(step)
            speeds.append(measured["tokens_per_second"])
        with progress.paused():
            clock.now += beside  # evaluation, or a checkpoint
    assert speeds == [160 / 3, 90 / 3]
    # 56 seconds went by when step 6 was done, the third of six
    assert measured["seconds_left"] == pytest.approx(56.0)
    assert "mfu" not in measured


def test_the_utilisation_is_flops_over_what_the_devices_could_do(tmp_path: Path, clock: Clock) -> None:
    asked: list[int] = []

    def flops(step: int) -> float | None:
        asked.append(step)
        return 1000.0 * step if step < 7 else None

    progress = StepProgress(new_log(tmp_path), 4, 9, step_flops=flops, peak_flops=5000.0)
    clock.now += 2.0
    assert progress.measure(6)["mfu"] == pytest.approx((4000 + 5000) / 2.0 / 5000)
    assert asked == [4, 5]
    clock.now += 2.0
    assert "mfu" not in progress.measure(8)  # those of step 7 are not known


def test_on_a_terminal_there_is_a_bar_and_a_line_of_details(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with StepProgress(log_on_terminal(tmp_path, monkeypatch), start=0, total=50_000) as progress:
        progress.report(METRICS, "exits 1 9 17 25  dropout 0.034 to 0.100 " + "x" * 99)
        progress.advance(12_345)
    lines = shown_lines(progress)
    capsys.readouterr()
    assert len(lines) == 2
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("training ")
    assert "12345/50000 loss 2.500  12,346 tok/s left" in lines[0]
    assert lines[1].startswith("lr 0.0012  grad 0.54  41% MFU  12 GB  exits 1 9 17 25  dropout 0.034 to")
    assert lines[1].endswith("…")


def shown_lines(progress: StepProgress) -> list[str]:
    """What is on the terminal, without colours."""
    console = progress.log.console
    with console.capture() as capture:
        console.print(progress.bars.get_renderable(), no_wrap=True)
    return [line.rstrip() for line in Text.from_ansi(capture.get()).plain.splitlines() if line.strip()]


def test_other_processes_show_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = new_log(tmp_path, active=False)
    with StepProgress(log, 0, 1) as progress:
        progress.count(10)
        progress.report(METRICS, "")
        progress.advance(1)
        assert list(track(log, "held out", [1, 2], 2)) == [1, 2]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


# --- other work


def go_through(log: RunLog, clock: Clock, number: int, seen: Callable[[], Any] = lambda: None) -> list[int]:
    items = []
    for item in track(log, "held out", range(number), number):
        items.append(item)
        clock.now += 1.0
        seen()
    return items


@pytest.mark.parametrize("number", [0, 1, 9, 25])
def test_long_work_beside_the_training_says_how_far_it_is(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    assert go_through(new_log(tmp_path), clock, number) == list(range(number))
    expected = [f"held out {done}/{number}" for done in (11, 22) if done <= number]
    assert capsys.readouterr().err.splitlines() == expected


@pytest.mark.parametrize("within", [False, True])
def test_on_a_terminal_it_has_a_bar_of_its_own(
    within: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """rich allows one live display; while there is the training's, it is a line of that."""
    log = log_on_terminal(tmp_path, monkeypatch)
    if not within:
        go_through(log, clock, 2)
        assert "held out" not in capsys.readouterr().err  # short work is quiet
        go_through(log, clock, 9)
        assert "held out" in capsys.readouterr().err
        return
    shown: list[int] = []
    with StepProgress(log, start=0, total=4) as progress:

        def see() -> None:
            shown.append(len([task for task in progress.bars.tasks if task.visible]))

        go_through(log, clock, 6, see)
        assert shown == [1, 1, 1, 2, 2, 2]
        assert [task.description for task in progress.bars.tasks] == ["training"]
    assert log.bars is None
    capsys.readouterr()


def test_the_peak_of_memory_is_in_bytes() -> None:
    before = peak_memory(torch.device("cpu"))
    assert before > 20e6
    block = torch.ones(60_000_000)
    assert peak_memory(torch.device("cpu")) >= before
    assert peak_memory(torch.device("cpu")) > block.nbytes
