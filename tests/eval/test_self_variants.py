"""Drafts that stop and draft trees as a user has them: `python -m eval generate` with their flags."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FLAGS: dict[str, list[str]] = {
    "chain": [],
    "stop": ["--draft_stop", "confidence", "--stop_threshold", "0.4"],
    "tree": ["--draft_tree", "--tree_top_k", "3", "--tree_tokens", "6"],
    "wrong": ["--tree_tokens", "6"],
}


def test_the_same_text_and_one_line_for_a_mistake(finished_run: Path) -> None:
    command = [sys.executable, "-m", "eval", "generate", "--run", str(finished_run), "--dtype", "float64"]
    command += ["--generation_strategy", "self_speculative", "--exit_layer", "2", "--num_speculations", "4"]
    command += ["--prompt", "def anna_1(value):\n", "--max_steps", "16"]
    started = {
        name: subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name, flags in FLAGS.items()
    }
    done = {name: (*process.communicate(), process.returncode) for name, process in started.items()}
    drafting = [name for name in FLAGS if name != "wrong"]
    assert [done[name][2] for name in drafting] == [0, 0, 0], done
    assert len({done[name][0] for name in drafting}) == 1
    figures = {name: done[name][1] for name in drafting}
    assert all("acceptance length" in line for line in figures.values())
    assert ["acceptance rate" in figures[name] for name in drafting] == [
        True,
        True,
        False,
    ]  # it is one of chains
    out, error, status = done["wrong"]
    assert (out, status) == ("", 2)
    assert "self_speculative: tree_tokens=6 is for draft_tree; add that or leave tree_tokens out" in error
    assert "Traceback" not in error
