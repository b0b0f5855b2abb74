from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from layerskip_model.errors import UserError
from train.config import LogConfig
from train.log import RunLog


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
    log.say_once("hello")
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


def test_nothing_to_tell_is_no_line(tmp_path: Path) -> None:
    make(tmp_path).write(1, {})
    assert not (tmp_path / "log.jsonl").exists()


def test_what_has_been_said_once_is_not_said_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = make(tmp_path)
    for text in ("a", "b", "a"):
        log.say_once(text)
    assert capsys.readouterr().err == "a\nb\n"


def test_text_is_said_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "runs/[bold]a[/bold] " + "x" * 300
    make(tmp_path).say(text)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == text + "\n"


# --- wandb


class FakeWandb:
    """Stands for the package; `calls` is what it was told."""

    class errors:  # noqa: N801 (the package's name)
        Error = RuntimeError

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def init(self, **settings: Any) -> FakeWandb:
        self.calls.append(settings)
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append((step, metrics))

    def finish(self) -> None:
        self.calls.append("finished")


def test_wandb_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = make(tmp_path, wandb={"project": "p", "name": "n", "mode": "offline"})
    log.write(3, {"loss": 1.0})
    log.close()
    settings = {"project": "p", "name": "n", "mode": "offline", "dir": str(tmp_path), "config": {"seed": 0}}
    began = {"id": (tmp_path / "wandb" / "run-id").read_text(), "resume": "allow"}
    assert fake.calls == [settings | began, (3, {"loss": 1.0}), "finished"]


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_tells_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = make(tmp_path, wandb={"project": "p"})
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log = make(tmp_path, wandb={"project": "p"})  # another process, from the checkpoint after step 1
    log.forget_after(1)
    for step in (2, 3, 4):
        log.write(step, {"loss": float(step)})
        log.write(step, {"heldout/loss": 0.5})  # the first process did not come so far
    inits = [call for call in fake.calls if isinstance(call, dict)]
    assert inits[0]["id"] == inits[1]["id"]
    told = [call for call in fake.calls if isinstance(call, tuple)]
    assert [step for step, metrics in told if "loss" in metrics] == [1, 2, 3, 4]
    assert [step for step, metrics in told if "heldout/loss" in metrics] == [2, 3, 4]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 2, 3, 3, 4, 4]


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
    written = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.stem for path in written] == ["run-" + (tmp_path / "wandb" / "run-id").read_text()]
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
