"""LayerSkip training (arXiv 2404.16710): layer dropout and an early-exit loss over one shared LM head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from eval.statistics import best_self_speculation_settings
from layerskip_model.early_exit import WEIGHTS, EarlyExitModel, ExitLoss
from layerskip_model.errors import UserError
from layerskip_model.layer_dropout import SHAPES, LayerDropout, layer_slice
from layerskip_model.token_loss import IGNORE_INDEX
from train.export import export_model
from train.metrics import Metrics
from train.objectives.base import Batch, Objective
from train.section import Section

Shape = Literal["exp", "linear", "log", "sine", "sigmoid", "constant"]
assert set(Shape.__args__) == set(SHAPES)  # type: ignore[attr-defined]
WeightName = Literal["sum", "uniform", "linear", "sqrt", "inverse", "inverse_sqrt"]
assert set(WeightName.__args__) == {"sum", *WEIGHTS}  # type: ignore[attr-defined]


COST_PER_ROW = 0.05
"""Time of one more row in a verification, over that of a pass of one row: what two CPU cores showed for up to
32 rows of a 12 x 192 model (5.4 ms for 8 rows, 3.8 for 1). A GPU is kinder, which favours longer drafts."""


class LayerDropoutConfig(Section):
    """Which samples skip which layers."""

    p_max: float = Field(ge=0.0, lt=1.0, description="the largest dropout rate, at the last layer")
    over_depth: Shape = Field("exp", description="D(l); the paper's is exp")
    over_time: Shape = Field("constant", description="S(t); exp from scratch, constant for a trained model")
    layers: str = Field("all", description="the layers that may be dropped: all, or a slice such as '1::2'")

    @field_validator("layers")
    @classmethod
    def _is_slice(cls, value: str) -> str:
        layer_slice(value, 1)
        return value


class EarlyExitConfig(Section):
    """Which exits have a loss, when, and how much it weighs."""

    exits: Literal["all"] | list[Annotated[int, Field(ge=1)]] = Field(
        "all", description="exit layers E (the first E layers run); the last layer always has its loss"
    )
    weights: WeightName | list[Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        "sum", description="e(l): the paper's sum, another shape, or each exit's share of the loss"
    )
    e_scale: float = Field(1.0, ge=0.0, le=1.0, description="scales the early exits in weights: sum")
    curriculum: Literal["rotational", "gradual", "none"] = Field("none", description="C(t, l)")
    every: int = Field(1, ge=1, description="R of the rotational curriculum: each exit is on once in R steps")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.every > 1 and self.curriculum != "rotational":
            raise ValueError(f"every: {self.every} needs curriculum: rotational, not {self.curriculum}")
        if isinstance(self.weights, list):
            if self.exits == "all" or len(self.weights) != len(self.exits):
                raise ValueError(f"weights: {self.weights} needs exits: a list with as many entries")
            if sum(self.weights) >= 1.0:
                raise ValueError(
                    f"weights: {self.weights} must sum to less than 1; the last layer gets the rest"
                )
        if isinstance(self.exits, list) and len(set(self.exits)) != len(self.exits):
            raise ValueError(f"exits: {self.exits} names an exit twice")
        return self


class LayerSkipConfig(Section):
    """`objective: {kind: layerskip, ...}`; leave a part out to train without it."""

    kind: Literal["layerskip"]
    layer_dropout: LayerDropoutConfig | None = None
    early_exit: EarlyExitConfig | None = None


class LayerSkip(Objective[LayerSkipConfig]):
    """The objective around `EarlyExitModel`: all parameters train, the export is the plain model."""

    config_class: ClassVar[type[Section]] = LayerSkipConfig

    def __init__(self, module: EarlyExitModel) -> None:
        super().__init__()
        self.module = module
        self.num_layers = module.backbone.num_layers

    @classmethod
    def build(cls, recipe: Any, model: PreTrainedModel) -> Self:
        """The objective for a recipe whose `objective` is a LayerSkipConfig."""
        config: LayerSkipConfig = recipe.objective
        num_layers = model.config.get_text_config().num_hidden_layers
        early_exit = config.early_exit or EarlyExitConfig(exits=[])
        exits = list(range(1, num_layers + 1)) if early_exit.exits == "all" else early_exit.exits
        for exit_layer in exits:
            if exit_layer > num_layers or (exit_layer == num_layers and early_exit.exits != "all"):
                raise UserError(
                    f"objective.early_exit.exits: {exit_layer} is not an early exit of a model with "
                    f"{num_layers} layers; use 1 to {num_layers - 1}"
                )
        exit_loss = ExitLoss(
            num_layers=num_layers,
            total_steps=recipe.total_steps,
            exits=exits,
            weights=early_exit.weights,
            e_scale=early_exit.e_scale,
            curriculum=early_exit.curriculum,
            every=early_exit.every,
        )
        return cls(EarlyExitModel(model, exit_loss, cls._dropout(config, recipe, num_layers)))

    @staticmethod
    def _dropout(config: LayerSkipConfig, recipe: Any, num_layers: int) -> LayerDropout | None:
        if config.layer_dropout is None or config.layer_dropout.p_max == 0.0:
            return None
        if not layer_slice(config.layer_dropout.layers, num_layers):
            raise UserError(
                f"objective.layer_dropout.layers: '{config.layer_dropout.layers}' names none of the model's "
                f"{num_layers} layers; use 'all' or a slice such as '1::2'"
            )
        return LayerDropout(
            **config.layer_dropout.model_dump(),
            num_layers=num_layers,
            total_steps=recipe.total_steps,
            seed=recipe.seed,
        )

    def count(self, batch: Batch) -> dict[str, int]:
        """All exits share the labels, so there is one term."""
        return {"tokens": int((batch["labels"] != IGNORE_INDEX).sum())}

    def forward(self, batch: Batch, step: int, denominators: dict[str, float]) -> tuple[Tensor, Metrics]:
        """J(t) over the global batch's tokens. In evaluation every exit's quality, and no loss weights."""
        terms = self.module(batch["input_ids"], batch["labels"], batch["row"], step)
        if self.training:
            loss = terms.weighted_sum() / denominators["tokens"]
            tokens = (batch["labels"] != IGNORE_INDEX).sum()
            metrics: Metrics = {f"exit_{e}/loss": (ce, tokens) for e, ce in terms.cross_entropy.items()}
            return loss, metrics | {"loss": (terms.cross_entropy[self.num_layers], tokens)}
        assert terms.tokens is not None
        last = terms.cross_entropy[self.num_layers]
        metrics = {"loss": (last, terms.tokens), "bits_per_token": (last / math.log(2.0), terms.tokens)}
        for exit_layer, cross_entropy in terms.cross_entropy.items():
            metrics[f"exit_{exit_layer}/loss"] = (cross_entropy, terms.tokens)
            metrics[f"exit_{exit_layer}/top1"] = (terms.correct[exit_layer], terms.tokens)
            metrics[f"exit_{exit_layer}/agreement"] = (terms.agreement[exit_layer], terms.tokens)
        return last, metrics

    def export(self, directory: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        """A plain transformers checkpoint, as the released LayerSkip models are."""
        prefix = "module.model."
        weights = {
            name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
        }
        export_model(self.module.model, weights, directory, dtype)

    def suggestion(self, heldout: dict[str, float]) -> dict[str, Any]:
        """The exit and number of drafts with the best predicted speedup at the measured agreement."""
        if self.num_layers == 1:
            return {"strategy": "autoregressive", "settings": {}, "predicted_speedup": 1.0}
        agreement = {e: heldout[f"exit_{e}/agreement"] for e in range(1, self.num_layers)}
        exit_layer, drafts, predicted = best_self_speculation_settings(
            agreement, self.num_layers, verify_cost_of_rows=lambda rows: 1.0 + COST_PER_ROW * (rows - 1)
        )
        return {
            "strategy": "self_speculative",
            "settings": {"exit_layer": exit_layer, "num_speculations": drafts},
            "predicted_speedup": predicted,
        }
