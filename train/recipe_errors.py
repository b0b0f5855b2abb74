"""One line for what is wrong with a recipe: the key, the value, the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem that validation found, and how many more there are."""
    problems = error.errors(include_url=False)
    # In a union of sections every member complains; an unknown key is what the user can act on.
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _one(first, root) + more


def _one(problem: Any, root: type[BaseModel]) -> str:
    parts, section = _resolve(problem["loc"], root)
    key = ".".join(str(part) for part in parts) or "recipe"
    value, context = problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key (value {value!r});{nearest(str(parts[-1]), section)}"
        case "missing":
            return f"{key}: missing; it has no default"
        case "union_tag_invalid":
            tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
            return f"{key}.kind: {context['tag']!r} is not one of these;{nearest(context['tag'], tags)}"
        case "union_tag_not_found":
            return f"{key}: needs a key 'kind', got {value!r}"
        case "literal_error":
            choices = [c.strip(" '") for c in context["expected"].replace(" or ", ", ").split(",")]
            return f"{key}: {value!r} is not one of these;{nearest(str(value), choices)}"
        case "value_error":
            return f"{key}: {context['error']}"
        case _:
            return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {value!r}"


def nearest(name: str, choices: Iterable[str]) -> str:
    """' did you mean ...? valid: ...' for the end of a message."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    guess = f" did you mean '{close[0]}'?" if close else ""
    return f"{guess} valid: {', '.join(choices)}"


def _resolve(location: tuple[str | int, ...], root: Any) -> tuple[list[str | int], list[str]]:
    """The key as the user wrote it, without pydantic's marks for union members, and its section's keys."""
    parts: list[str | int] = []
    keys: list[str] = []
    candidates: list[Any] = [root]
    for part in location:
        sections = [c for c in _members(candidates) if isinstance(c, type) and issubclass(c, BaseModel)]
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        if isinstance(part, int):
            parts.append(part)
            candidates = [arg for c in _members(candidates) for arg in get_args(c)]
        elif fields:
            parts.append(part)
            keys = [name for s in sections for name in s.model_fields]
            candidates = [field.annotation for field in fields]
        elif chosen := [s for s in sections if part == s.__name__ or part in _kind(s)]:
            candidates = list(chosen)
        elif part == location[-1]:
            parts.append(part)
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
