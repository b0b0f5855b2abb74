"""Captured strategies beside their eager twins, profiles, and what captured passes cannot do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eval import Request, run_benchmark, write_report
from eval.decoding.capture import GraphRunner
from eval.results import Report
from eval.target import Target
from layerskip_model.errors import UserError

OURS = ["autoregressive", "self_speculative", "prompt_lookup"]


@pytest.fixture(scope="module")
def captured_report(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """With passes of fixed shape, as on a GPU, which need no compiler; profiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.target.captured", GraphRunner)
        request = Request(
            num_samples=3, max_steps=8, settings={"num_speculations": 2}, compile=True, profile=True
        )
        return run_benchmark(tiny_target, request)


def test_captured_strategies_stand_beside_their_eager_twins(captured_report: Report) -> None:
    names = [strategy.name for strategy in captured_report.strategies]
    assert names[:6] == [*OURS, "hf_generate", "hf_early_exit", "hf_prompt_lookup"]
    assert names[6:] == [f"{name}_not_compiled" for name in OURS]
    assert all(strategy.equal == strategy.compared == 3 for strategy in captured_report.strategies[1:])
    assert [s.over_eager is not None for s in captured_report.strategies] == [True] * 3 + [False] * 6
    assert [s.over_eager for s in captured_report.sampled] == [None] * 6  # twins are greedy alone
    assert captured_report.settings["compile"] is True


def test_a_profile_has_a_row_for_each_of_ours(captured_report: Report, tmp_path: Path) -> None:
    rows = [(row.name, row.sampled) for row in captured_report.profile]
    assert rows == [(name, sampled) for sampled in (False, True) for name in OURS] + [
        (f"{name}_not_compiled", False) for name in OURS
    ]
    for row in captured_report.profile:
        assert row.steps >= 3
        assert row.overhead == pytest.approx(row.step / row.bare - 1)
    write_report(captured_report, tmp_path)
    table = (tmp_path / "table.txt").read_text()
    assert "Milliseconds a step" in table
    assert "Compiled over not compiled, self speculative: " in table
    assert max(map(len, table.splitlines())) <= 80
    assert "Over, %" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_compiled_passes_from_the_command_line(finished_run: Path, tmp_path: Path) -> None:
    """Some ten seconds of compiling for each of six passes."""
    command = [sys.executable, "-m", "eval", "benchmark", "--run", str(finished_run), "--num_samples", "2"]
    flags = [
        "--max_steps",
        "8",
        "--sample",
        "False",
        "--compile",
        "--profile",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    result = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert all(strategy.equal == strategy.compared == 2 for strategy in report.strategies[1:])
    assert len(report.profile) == 6


def test_attention_without_masks_decodes_one_text_at_a_time(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tiny_target.runner), "takes_masks", False)
    with pytest.raises(
        UserError, match=r"--batch_size 2: .* decodes one text at a time; give --attn_implementation sdpa"
    ):
        run_benchmark(tiny_target, Request(num_samples=4, batch_size=2))
