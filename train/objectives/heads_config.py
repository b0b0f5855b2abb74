"""What the recipe sections of all drafting heads share."""

from __future__ import annotations

from pydantic import Field

from train.section import FrozenModelSection


class HeadsConfig(FrozenModelSection):
    """Base of the sections for heads of which head k predicts the token k + 1 places on."""

    kind: str
    heads: int = Field(4, ge=1, description="K; head k predicts the token k + 1 places on")
    layers: int = Field(1, ge=1, description="residual blocks of a head")
    decay: float = Field(0.8, gt=0.0, le=1.0, description="head k's loss weighs decay^k")
    shared_projection: bool = Field(
        False,
        description="one matrix to the vocabulary for all heads instead of one each: smaller by as much",
    )
    init_heads: str | None = Field(
        None,
        min_length=1,
        description="a run, or a directory of heads, to begin from; default: copies of the LM head",
    )
