"""The strategies by name, and the checks of their settings."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from typing import Any

from eval.decoding.drafters.autoregressive import Autoregressive
from eval.decoding.drafters.base import Drafter, Range
from eval.decoding.drafters.self_speculative import SelfSpeculative
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner

STRATEGIES: dict[str, type[Drafter]] = {
    "autoregressive": Autoregressive,
    "self_speculative": SelfSpeculative,
}
ALIASES = {"greedy": "autoregressive"}


def strategy_name(name: str) -> str:
    """The name under which a strategy is known, aliases resolved. Raises UserError for an unknown one."""
    known = ALIASES.get(name, name)
    if known not in STRATEGIES:
        hint = _nearest(name, [*STRATEGIES, *ALIASES])
        raise UserError(f"unknown strategy '{name}'{hint}; there are {', '.join(STRATEGIES)}")
    return known


def make_drafter(name: str, runner: Runner, **settings: Any) -> Drafter:
    """The drafter of that name with these settings.

    Raises UserError for an unknown name or setting, and for a missing, mistyped or out-of-range value.
    """
    name = strategy_name(name)
    strategy = STRATEGIES[name]
    fields = {field.name: field for field in dataclasses.fields(strategy.Settings)}
    ranges = strategy.ranges(runner)
    for key, value in settings.items():
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise UserError(
                f"{name} has no setting '{key}'{_nearest(key, list(fields))}; its settings: {known}"
            )
        if key in ranges and value != fields[key].default:
            _check_range(name, key, value, ranges[key])
    for key, field in fields.items():
        if key not in settings and field.default is dataclasses.MISSING:
            raise UserError(f"{name} needs {key}" + (f": {_spoken(ranges[key])}" if key in ranges else ""))
    return strategy(runner, strategy.Settings(**settings))


def _check_range(name: str, key: str, value: Any, limits: Range) -> None:
    low, high = limits
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        raise UserError(f"{name}: {key}={value!r} is not valid; give {_spoken(limits)}")


def _spoken(limits: Range) -> str:
    low, high = limits
    if high is None:
        return f"a whole number of {low} or more"
    if high < low:
        return "nothing: the model has too few layers for this strategy"
    return f"a whole number from {low} to {high}"


def _nearest(name: str, known: list[str]) -> str:
    matches = get_close_matches(name, known, n=1)
    return f", did you mean '{matches[0]}'?" if matches else ""
