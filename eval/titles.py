"""What a strategy is called in tables, plots and sentences: its label, its marks, its settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import PurePath
from typing import Any, Protocol

NOT_LOSSLESS = " (not lossless)"
SETTING_SHOWN = 24  # characters of one setting's value in a strategy's name


class Named(Protocol):
    """A strategy of a table: what it is called, what it was asked for, and which of that is its entry's alone."""

    @property
    def label(self) -> str: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def variant(self) -> Sequence[str]: ...
    @property
    def sampled(self) -> bool: ...
    @property
    def lossless(self) -> bool: ...


def value_text(value: Any) -> str:
    """A value as it is printed: floats short, text without quotes."""
    if isinstance(value, float):
        return format(value, "g")
    return value if isinstance(value, str) else json.dumps(value)


def setting_words(settings: dict[str, Any], keys: Collection[str] | None = None) -> list[str]:
    """`exit_layer=2`, `draft_tree` (of what is True the key alone), ...; those of `keys`, all by default."""
    return [
        key if value is True else f"{key}={_short(key, value)}"
        for key, value in settings.items()
        if keys is None or key in keys
    ]


def _short(key: str, value: Any) -> str:
    text = PurePath(value).name if key == "draft" else value_text(value)
    return text if len(text) <= SETTING_SHOWN else text[: SETTING_SHOWN - 3] + "..."


def marked(one: Named) -> str:
    """The label with the settings that are its alone, marked where it samples or is not lossless."""
    return ", ".join([_label(one), *setting_words(one.settings, one.variant)])


def titled(one: Named) -> str:
    """The same with all its settings."""
    return ", ".join([_label(one), *setting_words(one.settings)])


def _label(one: Named) -> str:
    return one.label + (" (sampled)" if one.sampled else "") + ("" if one.lossless else NOT_LOSSLESS)
