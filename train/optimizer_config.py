"""The recipe's `optimizer:` and `schedule:` sections."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from train.section import Section

Betas = Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)]


class OptimizerSection(Section):
    """What every optimizer has."""

    kind: str
    lr: float = Field(gt=0.0, description="the full learning rate, which schedule multiplies")
    betas: Betas = Field([0.9, 0.95], description="decay of AdamW's two running averages")
    eps: float = Field(1e-8, gt=0.0, description="added to AdamW's denominator")
    weight_decay: float = Field(
        0.1, ge=0.0, description="decoupled, times the learning rate; of matrices only"
    )
    clip_norm: float | None = Field(1.0, gt=0.0, description="largest norm of the gradient; null: don't clip")


class AdamWConfig(OptimizerSection):
    """torch's AdamW for every parameter; no weight decay on vectors."""

    kind: Literal["adamw"]


class AdamW8bitConfig(OptimizerSection):
    """AdamW with 8-bit averages for the matrices of the decoder layers (arXiv 2110.02861; pip install bitsandbytes).

    Embeddings, head and vectors keep 32-bit averages, as its authors advise. One process or DDP.
    """

    kind: Literal["adamw_8bit"]


class MuonConfig(OptimizerSection):
    """torch's Muon for the matrices of the decoder layers, AdamW for everything else. One process or DDP."""

    kind: Literal["muon"]
    lr: float = Field(gt=0.0, description="of the matrices; schedule multiplies it")
    adamw_lr: float = Field(gt=0.0, description="of embeddings, head and vectors; schedule multiplies it")
    momentum: float = Field(0.95, ge=0.0, lt=1.0, description="of Muon, Nesterov's")


AnyOptimizer = AdamWConfig | AdamW8bitConfig | MuonConfig
OptimizerConfig = Annotated[AnyOptimizer, Field(discriminator="kind")]


class ScheduleConfig(Section):
    """The learning rate as a function of the optimizer step."""

    kind: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the rate falls after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="linear from 0 to the full rate")
    final_fraction: float = Field(
        0.0, ge=0.0, le=1.0, description="of the full rate, at the last step; not used by constant"
    )

    def factor(self, step: int, total_steps: int) -> float:
        """What the learning rate is multiplied with at a step of 0..total_steps - 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        done = (step - self.warmup_steps + 1) / max(total_steps - self.warmup_steps, 1)
        falling = 0.5 * (1.0 + math.cos(math.pi * done)) if self.kind == "cosine" else 1.0 - done
        return self.final_fraction + (1.0 - self.final_fraction) * falling
