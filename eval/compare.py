"""Runs beside each other: what a change of the recipe did to every exit and to the speed, over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eval.target import RunFiles, open_run
from layerskip_model.errors import UserError

REPORT = Path("report") / "report.json"  # where a run's benchmark is looked for


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with different seeds."""

    name: str
    runs: list[RunFiles]

    def spread(self, value: Callable[[RunFiles], float | None]) -> Spread | None:
        """A number of every run; None where one lacks it."""
        found = [value(run) for run in self.runs]
        known = [number for number in found if number is not None]
        return Spread(known) if len(known) == len(found) else None


@dataclass(frozen=True)
class Spread:
    """One number per seed."""

    values: list[float]

    def text(self, form: str, scale: float = 1.0) -> str:
        """The mean with the smallest and the largest, which for a few seeds says more than a fitted interval."""
        mean, low, high = (scale * f(self.values) for f in (np.mean, np.min, np.max))
        return f"{mean:{form}}" if len(self.values) == 1 else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def group_runs(directories: Sequence[str]) -> list[Group]:
    """The finished runs, those whose recipes differ only in seed, directory and logging together.

    A group is named after its first directory, without the seed at its end. Raises UserError where one is no
    finished run.
    """
    groups: dict[str, list[RunFiles]] = {}
    names: dict[str, str] = {}
    for directory in directories:
        run = open_run(directory)
        recipe = _recipe(run)
        seed = recipe.pop("seed", 0)
        for key in ("output_dir", "log", "checkpoint"):
            recipe.pop(key, None)
        key = json.dumps(recipe, sort_keys=True)
        groups.setdefault(key, []).append(run)
        names.setdefault(key, run.directory.name.removesuffix(f"-{seed}"))
    return [Group(names[key], runs) for key, runs in groups.items()]


def _recipe(run: RunFiles) -> dict[str, Any]:
    path = run.directory / run.content["recipe"]
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"run '{run.directory}': {path.name} cannot be read ({error})") from None
    if not isinstance(recipe, dict):
        raise UserError(f"run '{run.directory}': {path.name} is damaged; train again")
    return recipe


def compare(groups: Sequence[Group], exits: Sequence[int] | None) -> str:
    """A Markdown table: bits per byte of the last exit, then cross entropy (nats a token) and agreement (%) of `exits`.

    With a benchmark in RUN/report, the greedy speedup of its self-speculation and its settings. `exits` default to
    the quarters of the model. Raises UserError for an exit that a run did not measure.
    """
    depth = min(_depth(run) for group in groups for run in group.runs)
    shown = exits if exits is not None else sorted({max(1, depth * part // 8) for part in (1, 2, 4, 6)})
    with_speed = any(_speed(run) is not None for group in groups for run in group.runs)
    head = ["run", "seeds", "bits per byte"]
    head += [f"exit {e}: nats, agreement %" for e in shown]
    head += ["self-speculation"] if with_speed else []
    lines = [head, ["---"] * len(head)]
    for group in groups:
        cells = [group.name, str(len(group.runs)), _shown(group.spread(_metric("bits_per_byte")), ".3f")]
        for exit_layer in shown:
            nats = group.spread(_metric(f"exit_{exit_layer}/loss"))
            agreement = group.spread(_metric(f"exit_{exit_layer}/agreement"))
            if nats is None:
                raise UserError(
                    f"--exits {exit_layer}: not measured in run '{group.runs[0].directory}'; it has {depth} exits"
                )
            cells.append(f"{_shown(nats, '.2f')}; {_shown(agreement, '.1f', 100.0)}")
        if with_speed:
            cells.append(_shown(group.spread(_speed), ".2f", unit="x"))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _shown(spread: Spread | None, form: str, scale: float = 1.0, unit: str = "") -> str:
    return "-" if spread is None else spread.text(form, scale) + unit


def _metric(name: str) -> Callable[[RunFiles], float | None]:
    return lambda run: run.content["heldout_metrics"].get(name)


def _depth(run: RunFiles) -> int:
    names = [name for name in run.content["heldout_metrics"] if name.startswith("exit_")]
    return max((int(name.split("/")[0].removeprefix("exit_")) for name in names), default=1)


def _speed(run: RunFiles) -> float | None:
    """The median speedup of self-speculation in the run's own benchmark, if it has one."""
    try:
        report = json.loads((run.directory / REPORT).read_text(encoding="utf-8"))
        found = [row for row in report["strategies"] if row["name"] == "self_speculative"]
        return float(found[0]["speedup_median"]["value"]) if found else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"run '{run.directory}': {REPORT} is damaged ({error}); benchmark it again") from None
