"""Processes that share a benchmark: the same prompts and tokens as one, and an end for all whatever happens to one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.benchmark import Request, run_benchmark, run_together
from eval.measure import Measured, merged
from eval.ranks import ALONE, Ranks
from eval.results import PromptResult, Report, StrategyResult
from eval.target import Target
from layerskip_model.errors import UserError

FLAGS = ["--num_samples", "5", "--max_steps", "6", "--strategies", "autoregressive,self_speculative"]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_item_is_somebodys_once(count: int) -> None:
    shares = [Ranks(index, count).share(list(range(7))) for index in range(count)]
    assert sorted(item for share in shares for item in share) == list(range(7))
    assert shares[0] == list(range(0, 7, count))


def test_more_processes_than_batches_are_refused(tiny_target: Target) -> None:
    request = Request(["autoregressive"], num_samples=2, max_steps=2, sample=False)
    for index in range(3):
        with pytest.raises(UserError, match="batches: 2 for 3 processes; launch 2 or fewer"):
            run_together(tiny_target, request, Ranks(index, 3))


def test_alone_there_is_nobody_to_wait_for() -> None:
    with ALONE.together():
        assert ALONE.exchange("item") == ["item"]
    with pytest.raises(UserError, match="wrong"), ALONE.together():
        raise UserError("wrong")
    assert ALONE.device("cuda:1", None) == "cuda:1"
    assert ALONE.device(None, "auto") is None
    assert ALONE.settings(torch.device("cpu")) == {"processes": 1}


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    third = Ranks(index=6, count=8, local_index=2, local_count=4)
    assert third.device(None, None) is None  # no GPU here
    assert third.device("cpu", None) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert third.device(None, None) == third.device("cuda", None) == "cuda:2"
    assert third.device("cpu", None) == "cpu"
    for call, message in (
        (lambda: third.device("cuda:1", None), "--device 'cuda:1' with 8 processes"),
        (lambda: third.device(None, "auto"), "--device_map 'auto' with 8 processes"),
        (lambda: Ranks(0, 5, 0, 5).device(None, None), "on this machine: 5, and GPUs: 4"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_the_report_says_when_clocks_disturb_each_other() -> None:
    assert "timing" in Ranks(0, 2, 0, 2).settings(torch.device("cpu"))
    assert "timing" not in Ranks(0, 2, 0, 1).settings(torch.device("cpu"))  # one on each machine
    assert Ranks(0, 2, 0, 2).settings(torch.device("cuda:0")) == {"processes": 2}


def test_shares_become_one_result() -> None:
    one = {index: Measured(PromptResult(index=index, batch=index), [index]) for index in range(4)}
    key = ("autoregressive", False)
    assert merged([{key: {0: one[0], 2: one[2]}}, {key: {1: one[1], 3: one[3]}}]) == {key: one}


# --- real processes ----------------------------------------------------------------------------------------


def pair(how: str) -> list[subprocess.Popen[str]]:
    """Two processes that no launcher watches over."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.eval.ranks_worker", how],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def ends() -> dict[str, list[tuple[int, str, str]]]:
    """How the pairs end: for each process its exit status, standard output and standard error."""
    pairs = {how: pair(how) for how in ("refuses", "fails", "killed")}
    found = {}
    for how, processes in pairs.items():
        told = [process.communicate(timeout=120) for process in processes]
        found[how] = [(p.returncode, *texts) for p, texts in zip(processes, told, strict=True)]
    return found


def test_what_one_refuses_all_refuse_and_one_says(ends: dict[str, list[tuple[int, str, str]]]) -> None:
    assert ends["refuses"] == [(2, "", "error: --this 'one': is wrong\n"), (2, "", "")]


@pytest.mark.parametrize(("how", "status"), [("fails", 1), ("killed", -9)])
def test_nobody_waits_for_the_dead(
    ends: dict[str, list[tuple[int, str, str]]], how: str, status: int
) -> None:
    first, second = ends[how]
    assert first == (2, "", "error: one of the 2 processes ended before its time; its own message says why\n")
    assert second[0] == status
    assert ("ZeroDivisionError" in second[2]) == (how == "fails")


@pytest.fixture(scope="module")
def launched(
    finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A benchmark by torchrun on two processes, and the directory of its report."""
    place = tmp_path_factory.mktemp("launched") / "report"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "eval", "benchmark", "--model", str(finished_run / "export"), *FLAGS]
    command += ["--dtype", "float64", "--output_dir", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done, place


def without_clocks(strategies: list[StrategyResult]) -> list[dict[str, Any]]:
    """What decoding decides of a report, prompt by prompt."""
    names = ("index", "source", "batch", "status", "new_tokens", "text", "accepted_lengths", "tokens_equal")
    return [
        {"name": s.name, "prompts": [{name: getattr(p, name) for name in names} for p in s.prompts]}
        for s in strategies
    ]


def test_two_processes_find_what_one_finds(
    launched: tuple[subprocess.CompletedProcess[str], Path], tiny_target: Target
) -> None:
    done, place = launched
    assert done.returncode == 0, done.stderr
    together = Report.model_validate_json((place / "report.json").read_text())
    alone = run_benchmark(
        tiny_target, Request(["autoregressive", "self_speculative"], num_samples=5, max_steps=6)
    )
    assert [p.index for p in together.strategies[0].prompts] == [0, 1, 2, 3, 4]
    assert without_clocks(together.strategies) == without_clocks(alone.strategies)
    assert without_clocks(together.sampled) == without_clocks(alone.sampled)
    assert together.settings["processes"] == 2
    assert alone.settings["processes"] == 1


def test_one_report_is_printed_and_written(
    launched: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, place = launched
    assert done.stdout.count("report:") == 1
    assert done.stdout.count("(baseline)") == done.stdout.count("Strategies,")
    assert "processes" in (place / "report.md").read_text()
    assert json.loads((place / "report.json").read_text())["settings"]["timing"]
