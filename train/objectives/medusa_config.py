"""The recipe's `objective: {kind: medusa, ...}`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from train.objectives.heads_config import HeadsConfig

JOINT_ONLY = ("head_lr_multiple", "lambda_0", "ramp", "self_distillation")


class MedusaConfig(HeadsConfig):
    """`objective: {kind: medusa, ...}`: heads that guess tokens further on, for decoding with `medusa`."""

    kind: Literal["medusa"]
    stage: Literal["heads", "joint"] = Field(
        "heads",
        description="heads: Medusa-1, the model is frozen; joint: Medusa-2, it trains too (or its model.lora)",
    )
    head_lr_multiple: float = Field(
        4.0, gt=0.0, description="joint: the heads' learning rate over the model's"
    )
    lambda_0: float = Field(
        0.2, gt=0.0, description="joint: weight of the heads' losses beside the model's own"
    )
    ramp: Literal["constant", "sine"] = Field(
        "constant", description="joint: sine: lambda_0 grows over the run, as sin(pi/2 t/T)"
    )
    self_distillation: bool = Field(
        False, description="joint: the model's own loss is KL against itself without its model.lora"
    )

    @property
    def freezes_model(self) -> bool:
        """Whether the language model stays as it is."""
        return self.stage == "heads"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.stage == "joint" and self.init_heads is None:
            raise ValueError(
                "stage: joint needs init_heads: new heads would spoil the model; train them with stage: heads first"
            )
        for name in JOINT_ONLY:
            value = getattr(self, name)
            if self.stage == "heads" and value != type(self).model_fields[name].default:
                raise ValueError(f"{name}: {value} is for stage: joint; leave it out, or set stage: joint")
        return self
