"""Settings of strategies: their types, their ranges, and the one line that a wrong one gets."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from layerskip_model.errors import UserError

Number = int | float
Range = tuple[Number, Number | None]
"""The lowest and the highest value of a setting; None: no upper limit."""


def make_settings(strategy: str, kind: type[Any], ranges: dict[str, Range], values: dict[str, Any]) -> Any:
    """The settings `kind`, a dataclass, with these values.

    Raises UserError for an unknown setting, and for a missing, mistyped or out-of-range value.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types = get_type_hints(kind)
    for key, value in values.items():
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise UserError(f"{strategy} has no setting '{key}'{nearest(key, fields)}; its settings: {known}")
        if value != fields[key].default and not _fits(value, types[key], ranges.get(key)):
            wanted = spoken(types[key], ranges.get(key))
            raise UserError(f"{strategy}: {key}={value!r} is not valid; give {wanted}")
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{strategy} needs {key}: {spoken(types[key], ranges.get(key))}")
    return kind(**values)


def from_text(text: str | None, kind: Any) -> Any:
    """What a text stands for as a setting of type `kind`; None, no text at all, for True.

    What is neither a number nor a truth stays text. Raises ValueError.
    """
    (kind,) = _options(kind)
    if kind is bool and (text is None or text.lower() in ("true", "false")):
        return text is None or text.lower() == "true"
    if kind is bool or text is None:
        raise ValueError(text)
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), text)
    return kind(text) if kind in (int, float) else text


def nearest(name: str, known: Any) -> str:
    """A hint at the known name that is most like this one; nothing where none is."""
    matches = get_close_matches(name, list(known), n=1)
    return f", did you mean '{matches[0]}'?" if matches else ""


def _options(kind: Any) -> list[Any]:
    """The members of a union, None left out."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [member for member in members if member is not type(None)]


def _fits(value: Any, kind: Any, limits: Range | None) -> bool:
    (kind,) = _options(kind)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float):
        numbers = (int,) if kind is int else (int, float)
        if not isinstance(value, numbers) or isinstance(value, bool):
            return False
        low, high = limits if limits is not None else (float("-inf"), None)
        return low <= value and (high is None or value <= high)
    return isinstance(value, kind)


def spoken(kind: Any, limits: Range | None = None) -> str:
    """What may be given for a setting of type `kind`, in words."""
    (kind,) = _options(kind)
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if kind is bool:
        return "True or False"
    if kind not in (int, float):
        return getattr(kind, "spoken", f"a {kind.__name__}")
    number = "a whole number" if kind is int else "a number"
    if limits is None:
        return number
    low, high = limits
    if high is None:
        return f"{number} of {low} or more"
    if high < low:
        return "nothing: the model has too few layers for this strategy"
    return f"{number} from {low} to {high}"
