"""What the tests of the benchmark share: requests, files of prompts, and spies on its decodes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import eval.benchmark as module
from eval.contestants import Contestant
from eval.results import Report, StrategyResult

FOUR = ["autoregressive", "self_speculative", "hf_generate", "hf_early_exit"]
SETTINGS: dict[str, Any] = {
    "settings": {"exit_layer": 2, "num_speculations": 3},
    "max_steps": 10,
    "sample": False,
}


def dataset(directory: Path, prompts: Sequence[str], *others: dict[str, Any]) -> Path:
    path = directory / "prompts.jsonl"
    rows = [*({"prompt": prompt} for prompt in prompts), *others]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_name(report: Report) -> dict[str, StrategyResult]:
    return {strategy.name: strategy for strategy in report.strategies}


def spy_on(
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[str, list[int]], None],
    after: Callable[[str, Any], Any] = lambda name, generation: generation,
) -> None:
    """Call `before` ahead of every decode, and let `after` change what comes of it."""
    original = module.make_contestant

    def make(*args: Any) -> Contestant:
        contestant = original(*args)

        def decode(prompts: list[list[int]], streams: list[int]) -> Any:
            for prompt in prompts:
                before(contestant.name, prompt)
            return [after(contestant.name, one) for one in contestant.decode(prompts, streams)]

        return dataclasses.replace(contestant, decode=decode)

    monkeypatch.setattr(module, "make_contestant", make)
