"""docs/recipes.md from the schema: python -m train.recipe_docs > docs/recipes.md"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from train.config import Recipe
from train.objectives import OBJECTIVES
from train.section import Section

HEAD = """# Every key of a recipe

Made from the schema by `python -m train.recipe_docs > docs/recipes.md`; change the descriptions there.

A recipe is one YAML file: `python -m train RECIPE.yaml`. Any value can be replaced on the command line by its dotted
name: `optimizer.lr=0.01`, `data.train.0.kind=stdlib`; a mapping or list replaces the whole old one:
`optimizer='{kind: adamw, lr: 0.001}'`, and nothing after the `=` is null. `${seed}` stands for the value that the
recipe gives to another key. Unknown keys and wrong types are refused before anything is loaded or written.
"""
_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "mapping"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def render() -> str:
    """The whole page, in Markdown."""
    parts = {
        section: path for path, section in reversed(list(sections("", Recipe)))
    }  # each where it comes first
    return "\n".join([HEAD, *(line for part in reversed(parts) for line in _section(parts[part], part))])


def sections(path: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """A section and all that stand in it, each with its dotted path, in the order of the schema."""
    yield path, section
    for name, field in section.model_fields.items():
        inner = f"{path}.{name}".lstrip(".")
        if (path, name) == ("", "objective"):
            children = [objective.config_class for objective in OBJECTIVES.values()]
        else:
            children = _sections_in(field.annotation)
        for child in children:
            yield from sections(inner, child)


def description(name: str, field: FieldInfo) -> str:
    """A field's own description; of a section's, the section's; of a kind, that it is one."""
    if field.description:
        return field.description
    children = _sections_in(field.annotation)
    if name == "kind":
        return "selects this section"
    return _first_sentence(children[0]) if len(children) == 1 else "see its kinds" if children else ""


def _section(path: str, section: type[Section]) -> Iterator[str]:
    kind = section.model_fields.get("kind")
    if kind is not None and kind.is_required():
        path = f"{path}: {{kind: {get_args(kind.annotation)[0]}}}"
    if path:
        yield f"## `{path}`\n"
    yield f"{' '.join((inspect.getdoc(section) or '').split())}\n"
    yield "| key | type | default | |\n|---|---|---|---|"
    for key, field in section.model_fields.items():
        yield f"| `{key}` | {_type(field)} | {_default(field)} | {description(key, field)} |"
    yield ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    return "its defaults" if isinstance(value, Section) else f"`{json.dumps(value)}`".replace('"', "")


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {str(getattr(rule, name)).removesuffix('.0')}"
        for rule in field.metadata
        for name, sign in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return " ".join([_type_name(field.annotation), ", ".join(bounds)]).strip()


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, UnionType):
        names = [_type_name(member) for member in arguments if member is not NoneType]
        return " or ".join(dict.fromkeys(names))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_type_name(arguments[0])}s".replace("texts", "text")
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return _PLAIN.get(origin or annotation, "section")


def _sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that an annotation names, wherever in it."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return list(dict.fromkeys(s for part in get_args(annotation) for s in _sections_in(part)))


def _first_sentence(section: type[Section]) -> str:
    return " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split()).rstrip(".")


if __name__ == "__main__":
    print(render(), end="")
