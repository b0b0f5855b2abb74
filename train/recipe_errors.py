"""One line for what is wrong with a recipe: the key, the value, the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_TYPES = {
    "list_type": "a list",
    "float_type": "a number",
    "int_type": "a whole number",
    "string_type": "text in quotes",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """The problem that the user can act on best, and how many more there are."""
    by_key: dict[str, list[Any]] = {}
    for problem in error.errors(include_url=False):
        by_key.setdefault(".".join(map(str, _resolve(problem, root)[0])), []).append(problem)
    # Every member of a union complains, some of them about a key further in: that one is meant.
    keys = [key for key in by_key if not any(other.startswith(f"{key}.") for other in by_key)]
    # A misspelt key also shows up as a missing one.
    unknown = (key for key in keys if by_key[key][0]["type"] == "extra_forbidden")
    first = next(unknown, keys[0])
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    text = _one(first, by_key[first], _resolve(by_key[first][0], root)[1])
    return " ".join(text.split()) + more


def _one(key: str, problems: list[Any], section: list[str]) -> str:
    """What is wrong with one key; several problems are the members of a union that all refuse its value."""
    problem = next((p for p in problems if p["type"] == "literal_error"), problems[0])
    value, context = shorten(problem["input"]), problem.get("ctx", {})
    types = list(dict.fromkeys(_TYPES[p["type"]] for p in problems if p["type"] in _TYPES))
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key (value {value});{nearest(key.rsplit('.', 1)[-1], section)}"
        case "missing":
            return f"{key}: missing; it has no default"
        case "union_tag_invalid":
            kind, choices = context["tag"], _names(context["expected_tags"])
            return f"{key}.kind: '{kind}' is not valid;{nearest(str(kind), choices)}"
        case "union_tag_not_found":
            return f"{key}: needs a key 'kind', got {value}"
        case "literal_error":
            choices = _names(context["expected"].replace(" or ", ", "))
            return f"{key}: {value} is not valid;{nearest(str(problem['input']), choices, types)}"
        case "value_error":
            # Sections name their own keys, from themselves on.
            text = str(context["error"])
            inside = text.split(":")[0].split(".")[0] in section
            return f"{key}{'.' if inside else ': '}{text}" if key else text
        case "too_short":
            return f"{key}: needs at least {context['min_length']} entries, got {value}"
        case "too_long":
            return f"{key}: takes at most {context['max_length']} entries, got {value}"
        case kind if kind in _TYPES:
            return f"{key}: must be {' or '.join(types)}, got {value}"
        case _:
            wanted = problem["msg"].removeprefix("Input should ").removeprefix("String should ")
            return f"{key}: must {wanted}, got {value}"


def _names(listed: str) -> list[str]:
    """Of pydantic's "'a', 'b'"."""
    return [name.strip(" '") for name in listed.split(",")]


def nearest(name: str, choices: Iterable[str], others: Iterable[str] = ()) -> str:
    """' did you mean ...? valid: ...' for the end of a message; `others` are values that are no names."""
    choices = list(choices)
    return f"{guess(name, choices)} valid: {', '.join([*choices, *others])}"


def guess(name: str, choices: Iterable[str]) -> str:
    """' did you mean ...?', or nothing where no choice is like it."""
    choices = list(choices)
    initials = "".join(word[:1] for word in name.split("_"))  # learning_rate is lr here
    abbreviated = [initials] if len(initials) > 1 and initials in choices else []
    close = abbreviated or difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f" did you mean '{close[0]}'?" if close else ""


def shorten(value: Any) -> str:
    """A value as it stands in a message: not more than about a hundred characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _resolve(problem: Any, root: Any) -> tuple[list[str | int], list[str]]:
    """The key as the user wrote it, without pydantic's marks for union members, and its section's keys."""
    location: tuple[str | int, ...] = problem["loc"]
    parts: list[str | int] = []
    keys: list[str] = []
    candidates: list[Any] = [root]
    for depth, part in enumerate(location, start=1):
        sections = [c for c in _members(candidates) if isinstance(c, type) and issubclass(c, BaseModel)]
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        keys = [name for s in sections for name in s.model_fields]
        if isinstance(part, int):
            parts.append(part)
            candidates = [arg for c in _members(candidates) for arg in get_args(c)]
        elif fields:
            parts.append(part)
            candidates = [field.annotation for field in fields]
        elif chosen := [s for s in sections if part == s.__name__ or part in _kind(s)]:
            candidates = list(chosen)
        elif depth == len(location) and problem["type"] == "extra_forbidden":
            parts.append(part)
    if problem["type"] == "value_error":  # raised by the section that the key names
        sections = [c for c in _members(candidates) if isinstance(c, type) and issubclass(c, BaseModel)]
        keys = [name for s in sections for name in s.model_fields]
    return parts, keys


def _members(annotations: list[Any]) -> list[Any]:
    """Unions and Annotated taken apart."""
    flat: list[Any] = []
    for annotation in annotations:
        if get_origin(annotation) is Annotated:
            flat += _members([get_args(annotation)[0]])
        elif get_origin(annotation) in (Union, UnionType):
            flat += _members(list(get_args(annotation)))
        else:
            flat.append(annotation)
    return flat


def _kind(section: type[BaseModel]) -> tuple[Any, ...]:
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field else ()
