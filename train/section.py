"""The base of every part of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One mapping of a recipe: unknown keys are refused, types are not converted, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
