"""Runs grouped by recipe, their numbers as a table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.compare import compare, group_runs
from layerskip_model.errors import UserError


def write_run(place: Path, seed: int, agreement: float, speed: float | None = None, **recipe: Any) -> str:
    """What `compare` reads of a finished run of two layers."""
    place.mkdir()
    values = {"seed": seed, "output_dir": str(place), "log": {"every": seed + 1}, "max_steps": 5} | recipe
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    metrics = {
        "bits_per_byte": 1.5 + seed,
        "exit_1/loss": 3.0,
        "exit_1/agreement": agreement,
        "exit_2/loss": 2.0,
    }
    run = {"base": "export", "heldout": "heldout.jsonl", "recipe": "recipe.yaml", "heldout_metrics": metrics}
    (place / "run.json").write_text(json.dumps(run | {"suggested": {"strategy": "x", "settings": {}}}))
    if speed is not None:
        (place / "report").mkdir()
        rows = [{"name": "self_speculative", "speedup_median": {"value": speed}}]
        (place / "report" / "report.json").write_text(json.dumps({"strategies": rows}))
    return str(place)


def test_runs_that_differ_in_the_seed_are_one_row(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "plain-0", 0, 0.25, 1.0),
        write_run(tmp_path / "skip-0", 0, 0.5, 1.5, objective={"kind": "layerskip"}),
        write_run(tmp_path / "plain-1", 1, 0.35, 1.2),
    ]
    assert compare(group_runs(runs), [1]).splitlines() == [
        "| run | seeds | bits per byte | exit 1: nats, agreement % | self-speculation |",
        "| --- | --- | --- | --- | --- |",
        "| plain | 2 | 2.000 [1.500, 2.500] | 3.00 [3.00, 3.00]; 30.0 [25.0, 35.0] | 1.10 [1.00, 1.20]x |",
        "| skip | 1 | 1.500 | 3.00; 50.0 | 1.50x |",
    ]


def test_without_benchmarks_there_is_no_column_of_speed(tmp_path: Path) -> None:
    table = compare(group_runs([write_run(tmp_path / "plain-3", 3, 0.25)]), None)
    assert "self-speculation" not in table
    assert "exit 1: nats" in table


@pytest.mark.parametrize("broken", ["{", "{}", "[]", "\xff"])
def test_a_damaged_benchmark_is_named(tmp_path: Path, broken: str) -> None:
    run = write_run(tmp_path / "plain-3", 3, 0.25, 1.0)
    (tmp_path / "plain-3" / "report" / "report.json").write_text(broken, encoding="latin-1")
    with pytest.raises(UserError, match=r"report\.json is damaged"):
        compare(group_runs([run]), None)


def test_an_exit_that_was_not_measured_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "plain-3", 3, 0.25)
    with pytest.raises(UserError, match=r"--exits 7: not measured in run '.*plain-3'; it has 2 exits"):
        compare(group_runs([run]), [7])


def test_the_command(finished_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eval", "compare"]
    out = subprocess.run([*command, str(finished_run), "--exits", "1,2"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("\n") == 3
    bad = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "is no finished training run" in bad.stderr
