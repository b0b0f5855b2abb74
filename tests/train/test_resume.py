"""A run that was stopped and went on leaves what one leaves that never stopped, bit for bit."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.train.tiny_runs import (
    assert_close_weights,
    assert_equal_weights,
    at_step,
    launch_two,
    log_lines,
    recipe_values,
    start,
    tiny_recipe,
    write_recipe,
    write_text,
)
from train import Interrupted, loop, parse_recipe, train
from train.checkpoint import list_checkpoints
from train.data.batches import Batch, Batches
from train.data.prepare import PreparedData
from train.data.streams import SourceLost

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw", "lr": 0.005},
    "muon": {"kind": "muon", "lr": 0.02, "adamw_lr": 0.005},
}
# Neither checkpoints nor stops fall on the steps that are logged: sums in progress have to survive too.
RUN = {"max_steps": 11, "log": {"every": 4}, "checkpoint": {"every": 3}, "evaluate": {"every": 5}}


class Crash(Exception):
    """Stands for a killed process."""


class Struck(NamedTuple):
    """A process that a signal will strike, and its run."""

    directory: Path
    values: dict[str, Any]
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: train(tiny_recipe(folder / name, text, **RUN, optimizer=optimizer))
        for name, optimizer in OPTIMIZERS.items()
    }


def crash() -> None:
    raise Crash


def assert_same_run(left: Path, right: Path) -> None:
    assert_equal_weights(left, right)
    assert log_lines(left) == log_lines(right)
    metrics = [json.loads((run / "run.json").read_text()) for run in (left, right)]
    assert metrics[0]["heldout_metrics"] == metrics[1]["heldout_metrics"]
    assert metrics[0]["fingerprint"] == metrics[1]["fingerprint"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stopped_twice_equals_never_stopped(
    optimizer: str, text: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path / "run", text, **RUN, optimizer=OPTIMIZERS[optimizer])
    before = signal.getsignal(signal.SIGTERM)
    for step, number in ((1, signal.SIGTERM), (6, signal.SIGINT)):
        with (
            at_step(step, lambda number=number: signal.raise_signal(number)),
            pytest.raises(Interrupted, match=rf"after step {step + 2} of 11; run the same command to go on"),
        ):
            train(recipe)
        assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{step + 2:08d}"
        assert not (tmp_path / "run" / "run.json").exists()
        assert signal.getsignal(signal.SIGTERM) == before
    train(recipe)
    assert_same_run(tmp_path / "run", whole[optimizer])


@pytest.mark.parametrize("step", [2, 8, 10])
def test_crashed_between_checkpoints_equals_never_stopped(
    step: int, text: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path / "run", text, **RUN, optimizer=OPTIMIZERS["adamw"])
    with at_step(step, crash), pytest.raises(Crash):
        train(recipe)
    train(recipe)
    assert_same_run(tmp_path / "run", whole["adamw"])


def test_a_crash_while_exporting_costs_no_training(
    text: Path, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path / "run", text, **RUN, optimizer=OPTIMIZERS["adamw"])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_export", lambda *_: crash())
        with pytest.raises(Crash):
            train(recipe)
    with at_step(10, crash):  # no step is done again
        train(recipe)
    assert_same_run(tmp_path / "run", whole["adamw"])


class LosingSource:
    """Batches that end with SourceLost before step `at`."""

    def __init__(self, batches: Batches, at: int) -> None:
        self.batches, self.at = batches, at

    def __iter__(self) -> Iterator[list[Batch]]:
        for number, micro in enumerate(self.batches):
            if number == self.at:
                raise SourceLost("data.train[0]: the source is gone; run the same command to go on")
            yield micro

    def state(self) -> Any:
        return {"place": 7}


@pytest.mark.parametrize("at", [0, 5])
def test_a_lost_source_costs_no_finished_step(
    at: int, text: Path, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is finished is saved, with where the streams were, before the error ends the run."""
    recipe = tiny_recipe(tmp_path / "run", text, **RUN, optimizer=OPTIMIZERS["adamw"])
    given: list[Any] = []
    real = PreparedData.batches

    def batches(self: PreparedData, rows: Any, **settings: Any) -> Any:
        given.append(settings.pop("state"))
        made = real(self, rows, **settings)
        return LosingSource(made, at) if len(given) == 1 else made

    monkeypatch.setattr(PreparedData, "batches", batches)
    with pytest.raises(SourceLost, match="the source is gone"):
        train(recipe)
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved[-1:]] == ["step-00000005"] * bool(at)
    train(recipe)
    assert given == [None, {"place": 7} if at else None]
    assert_same_run(tmp_path / "run", whole["adamw"])


def test_the_log_has_every_step_once(whole: dict[str, Path]) -> None:
    for run in whole.values():
        lines = log_lines(run)
        assert [line["step"] for line in lines if "loss" in line] == [4, 8, 11]
        assert [line["step"] for line in lines if "heldout/loss" in line] == [5, 10, 11]


def test_finished_runs_say_so_and_fresh_starts_over(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path / "run", text, max_steps=2)
    train(recipe)
    stamp = (tmp_path / "run" / "run.json").stat().st_mtime_ns
    capsys.readouterr()
    assert train(recipe) == tmp_path / "run"
    assert capsys.readouterr().err == f"{tmp_path / 'run'} is finished; pass --fresh to train it again\n"
    assert (tmp_path / "run" / "run.json").stat().st_mtime_ns == stamp
    lines = log_lines(tmp_path / "run")
    train(recipe, fresh=True)
    assert (tmp_path / "run" / "run.json").stat().st_mtime_ns > stamp
    assert log_lines(tmp_path / "run") == lines


def test_a_second_signal_kills() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        with loop.StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_outside_the_main_thread_takes_no_signals(text: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", text, max_steps=1)
    thread = threading.Thread(target=train, args=(recipe,))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "run.json").is_file()


def test_the_command_ends_with_status_130(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe_values(tmp_path / "run", text))
    monkeypatch.setattr(sys, "argv", ["train", str(path)])
    with at_step(1, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(SystemExit) as stopped:
        runpy.run_module("train", run_name="__main__")
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "stopped after step 3 of 4; run the same command to go on"
    )


@pytest.fixture(scope="module", autouse=True)
def struck(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Struck]]:
    """Real processes that real signals strike; they run while the other tests do."""
    folder = tmp_path_factory.mktemp("struck")
    values = {
        name: recipe_values(folder / name, text, **RUN, optimizer=optimizer)
        for name, optimizer in OPTIMIZERS.items()
    }
    values["torchrun"] = recipe_values(folder / "torchrun", text, **RUN | {"max_steps": 60})
    paths = {name: str(write_recipe(folder / f"{name}.yaml", values[name])) for name in values}
    module = "tests.train.signalled_run"
    processes = {
        "adamw": start("-m", module, "4", "SIGTERM", paths["adamw"]),
        "muon": start("-m", module, "7", "SIGKILL", paths["muon"]),
        "torchrun": launch_two(module, "4", "SIGTERM", paths["torchrun"]),
    }
    yield {name: Struck(folder / name, values[name], process) for name, process in processes.items()}
    for process in processes.values():
        process.kill()


def test_sigterm_saves_and_ends_with_status_130(struck: dict[str, Struck], whole: dict[str, Path]) -> None:
    run = struck["adamw"]
    _, error = run.process.communicate(timeout=120)
    assert run.process.returncode == 130, error
    assert error.splitlines()[-1] == "stopped after step 6 of 11; run the same command to go on"
    assert list_checkpoints(run.directory / "checkpoints")[-1].name == "step-00000006"
    train(parse_recipe(run.values))
    assert_same_run(run.directory, whole["adamw"])


def test_kill_9_goes_on_from_the_last_checkpoint(struck: dict[str, Struck], whole: dict[str, Path]) -> None:
    run = struck["muon"]
    run.process.communicate(timeout=120)
    assert run.process.returncode == -signal.SIGKILL
    assert list_checkpoints(run.directory / "checkpoints")[-1].name == "step-00000006"
    train(parse_recipe(run.values))
    assert_same_run(run.directory, whole["muon"])


def test_sigterm_to_torchrun_stops_both_processes(struck: dict[str, Struck], tmp_path: Path) -> None:
    run = struck["torchrun"]
    _, error = run.process.communicate(timeout=120)
    assert "stopped after step" in error, error
    newest = list_checkpoints(run.directory / "checkpoints")[-1]
    done = int(newest.name.removeprefix("step-"))
    assert 5 <= done < 60
    assert max(line["step"] for line in log_lines(run.directory)) <= done
    train(parse_recipe(run.values))  # on one process now: the same to rounding
    train(parse_recipe(run.values | {"output_dir": str(tmp_path / "whole")}))
    assert_close_weights(run.directory, tmp_path / "whole")
    assert [line["step"] for line in log_lines(run.directory) if "loss" in line] == list(range(4, 61, 4))
