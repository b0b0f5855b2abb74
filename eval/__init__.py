"""Decode with a model and measure how fast and how faithful that is. The names below are for use from Python."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.benchmark import Request, run_benchmark
    from eval.choosing import Choosing
    from eval.exits import heldout_texts, measure_exits
    from eval.generate import Generator
    from eval.report import write_report
    from eval.target import Target, load_target

__all__ = [
    "Choosing",
    "Generator",
    "Request",
    "Target",
    "heldout_texts",
    "load_target",
    "measure_exits",
    "run_benchmark",
    "write_report",
]
_MODULES = {
    "Choosing": "choosing",
    "Generator": "generate",
    "Request": "benchmark",
    "Target": "target",
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
