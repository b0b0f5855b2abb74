"""Decode with a model and measure how fast and how faithful that is. The names below are for use from Python."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.benchmark import Request, run_benchmark
    from eval.choosing import Choosing
    from eval.correctness import Check, check_tokens
    from eval.distribution import check_distribution
    from eval.exits import heldout_texts, measure_exits
    from eval.generate import Generator
    from eval.report import write_report
    from eval.target import Target, load_target

__all__ = [
    "Check",
    "Choosing",
    "Generator",
    "Request",
    "Target",
    "check_distribution",
    "check_tokens",
    "heldout_texts",
    "load_target",
    "measure_exits",
    "run_benchmark",
    "write_report",
]
_MODULES = {
    "Check": "correctness",
    "Choosing": "choosing",
    "Generator": "generate",
    "Request": "benchmark",
    "Target": "target",
    "check_distribution": "distribution",
    "check_tokens": "correctness",
    "heldout_texts": "exits",
    "load_target": "target",
    "measure_exits": "exits",
    "run_benchmark": "benchmark",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: torch takes seconds, and `python -m eval --help` none."""
    if name not in _MODULES:
        raise AttributeError(f"module 'eval' has no attribute '{name}'")
    return getattr(import_module(f"eval.{_MODULES[name]}"), name)
