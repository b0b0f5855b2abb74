"""The recipe's `objective: {kind: hydra, ...}`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from train.objectives.heads_config import HeadsConfig


class HydraConfig(HeadsConfig):
    """`objective: {kind: hydra, ...}`: heads that also read the tokens drafted before, for decoding with `hydra`.

    Hydra++ is layers: 4, prefix_attention: true, loss: teacher.
    """

    kind: Literal["hydra"]
    prefix_attention: bool = Field(
        False, description="a decoder layer of their own over the model's states, before all heads"
    )
    loss: Literal["teacher", "labels"] = Field(
        "teacher", description="teacher: the model's own distribution at each place; labels: the text"
    )
    dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="of what enters a head's blocks and its projection"
    )
