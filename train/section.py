"""The base of every part of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One mapping of a recipe: unknown keys are refused, types are not converted, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class FrozenModelSection(Section):
    """Base of an `objective` section whose method leaves the language model as it is and trains something beside it.

    Only such a model may be loaded in bfloat16 or quantized: what trains is float32.
    """

    @property
    def freezes_model(self) -> bool:
        """Whether this recipe's does; a method may have stages."""
        return True
