"""The recipe's `objective: {kind: eagle, ...}` and `objective: {kind: eagle3, ...}`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from train.section import FrozenModelSection


class DraftLayerConfig(FrozenModelSection):
    """Base of the sections for a head that is one decoder layer, which drafts as far as one likes."""

    kind: str
    init_heads: str | None = Field(
        None, min_length=1, description="a run, or a directory of a head, to begin from; default: a new one"
    )


class EagleConfig(DraftLayerConfig):
    """`objective: {kind: eagle, ...}`: a head that makes the next features, for `eagle` and `eagle2`."""

    kind: Literal["eagle"]
    steps: int = Field(5, ge=1, description="tokens drafted in a row where it is evaluated")
    noise: float = Field(
        0.1, ge=0.0, description="the features that enter are off by up to so much in training"
    )
    regression: float = Field(1.0, ge=0.0, description="weight of SmoothL1 to the next features")
    cross_entropy: float = Field(
        0.1, ge=0.0, description="weight of the cross entropy to what the target says"
    )
    bias: bool = Field(
        False, description="of fc; the authors' released heads have one, and vLLM loads heads without"
    )


class Eagle3Config(DraftLayerConfig):
    """`objective: {kind: eagle3, ...}`: a head trained for the steps that it drafts, for `eagle3`."""

    kind: Literal["eagle3"]
    steps: int = Field(7, ge=1, description="tokens drafted in a row, in training too")
    decay: float = Field(0.8, gt=0.0, le=1.0, description="step s's loss weighs decay^s, from 0 on")
    feature_layers: list[int] | None = Field(
        None,
        min_length=3,
        max_length=3,
        description="layers whose inputs are fused, from 0 on; default: 2, L/2 and L-3",
    )
    draft_vocab_size: int | None = Field(
        None, ge=1, description="the most frequent tokens of the answers; default: all of the target's"
    )
