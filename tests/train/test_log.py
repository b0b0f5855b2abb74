from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from layerskip_model.errors import UserError
from train import log as module
from train.config import LogConfig
from train.log import RunLog, StepProgress


def make(directory: Path, *, active: bool = True, **config: Any) -> RunLog:
    return RunLog(directory, LogConfig.model_validate(config), {"seed": 0}, active=active)


def rows(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_lines_are_appended(tmp_path: Path) -> None:
    make(tmp_path).write(1, {"loss": 2.0})
    log = make(tmp_path)  # another process goes on
    log.write(2, {"loss": 1.5, "rate": 0.1})
    log.close()
    assert rows(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "rate": 0.1}]
    assert (tmp_path / "log.jsonl").read_text().endswith("}\n")


def test_other_processes_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = make(tmp_path, active=False, wandb={"project": "x"})
    log.write(1, {"loss": 2.0})
    log.forget_after(0)
    log.say("hello")
    with StepProgress(log, 0, 1) as progress:
        progress.advance(1, 10, 1.0)
    log.close()
    assert list(tmp_path.iterdir()) == []
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("step", [0, 1, 2, 3, 9])
def test_steps_that_come_again_are_forgotten(tmp_path: Path, step: int) -> None:
    log = make(tmp_path)
    log.forget_after(step)  # no file yet
    assert not log.path.exists()
    for number in (1, 2, 2, 3):
        log.write(number, {"loss": float(number)})
    log.forget_after(step)
    assert [row["step"] for row in rows(tmp_path)] == [number for number in (1, 2, 2, 3) if number <= step]
    log.write(step + 1, {"loss": 0.0})
    assert rows(tmp_path)[-1] == {"step": step + 1, "loss": 0.0}
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("cut", [1, 5, 15])
def test_half_a_line_of_a_killed_process_is_dropped(tmp_path: Path, cut: int) -> None:
    log = make(tmp_path)
    for number in (1, 2):
        log.write(number, {"loss": float(number)})
    whole = log.path.read_text()
    log.path.write_text(whole[:-cut])
    log.forget_after(2)
    log.write(3, {"loss": 3.0})
    # Without its newline only, the line is whole.
    assert [row["step"] for row in rows(tmp_path)] == ([1, 2, 3] if cut == 1 else [1, 3])


def test_text_is_said_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "runs/[bold]a[/bold] " + "x" * 300
    make(tmp_path).say(text)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == text + "\n"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_without_a_terminal_there_is_a_line_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    with StepProgress(make(tmp_path), start=10, total=20) as progress:
        for step in range(11, 21):
            clock.now += 4.0
            progress.advance(step, 100, None if step == 11 else 2.0)
            assert progress.tokens_per_second == 25.0
    lines = capsys.readouterr().err.splitlines()
    # every third step, as ten seconds have gone by, and the last
    assert lines == [
        "step 13/20  loss 2.000  25 tok/s  0:28 left",
        "step 16/20  loss 2.000  25 tok/s  0:16 left",
        "step 19/20  loss 2.000  25 tok/s  0:04 left",
        "step 20/20  loss 2.000  25 tok/s  0:00 left",
    ]


def test_on_a_terminal_there_is_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with StepProgress(make(tmp_path), start=0, total=4) as progress:
        progress.advance(1, 100, 2.5)
    shown = capsys.readouterr().err
    assert "1/4" in shown
    assert "loss 2.500" in shown
    assert "tok/s" in shown
    assert "step 1/4" not in shown


# --- wandb


def test_wandb_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, metrics: dict[str, float], step: int) -> None:
            calls.append((step, metrics))

        def finish(self) -> None:
            calls.append("finished")

    class Fake:
        class errors:  # noqa: N801 (the package's name)
            Error = RuntimeError

        @staticmethod
        def init(**settings: Any) -> Run:
            calls.append(settings)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    log = make(tmp_path, wandb={"project": "p", "name": "n", "mode": "offline"})
    log.write(3, {"loss": 1.0})
    log.close()
    settings = {"project": "p", "name": "n", "mode": "offline", "dir": str(tmp_path), "config": {"seed": 0}}
    assert calls == [settings, (3, {"loss": 1.0}), "finished"]


def test_wandb_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    make(tmp_path)
    make(tmp_path, active=False, wandb={"project": "p"})
    with pytest.raises(UserError, match=r"^log\.wandb needs the wandb package: pip install wandb, or remove"):
        make(tmp_path, wandb={"project": "p"})


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.parametrize("by", ["recipe", "environment"])
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline" if by == "environment" else "online")
    log = make(tmp_path, wandb={"project": "p"} | ({"mode": "offline"} if by == "recipe" else {}))
    log.write(1, {"loss": 1.0})
    log.close()
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    assert rows(tmp_path) == [{"step": 1, "loss": 1.0}]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_without_an_account_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty).\n call wandb.login")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError) as caught:
        make(tmp_path, wandb={"project": "p"})
    assert str(caught.value).startswith("log.wandb: api_key not configured (no-tty). call wandb.login; run ")
    assert "\n" not in str(caught.value)
