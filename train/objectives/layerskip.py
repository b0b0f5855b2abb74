"""LayerSkip training (arXiv 2404.16710): layer dropout and an early-exit loss over one shared LM head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from eval.replay import OwnText
from layerskip_model.agreement import accepted_drafts
from layerskip_model.early_exit import WEIGHTS, EarlyExitModel, ExitLoss, LossTerms
from layerskip_model.errors import UserError
from layerskip_model.layer_dropout import SHAPES, LayerDropout, layer_slice
from layerskip_model.token_loss import IGNORE_INDEX
from train.export import export_model
from train.flops import model_flops
from train.metrics import Metrics
from train.objectives.base import Batch, Objective
from train.objectives.self_speculation import suggested_self_speculation
from train.section import Section

Shape = Literal["exp", "linear", "log", "sine", "sigmoid", "saturating", "constant"]
assert set(Shape.__args__) == set(SHAPES)  # type: ignore[attr-defined]
WeightName = Literal["sum", "uniform", "linear", "sqrt", "inverse", "inverse_sqrt"]
assert set(WeightName.__args__) == {"sum", *WEIGHTS}  # type: ignore[attr-defined]


HELDOUT_DRAFTS = (2, 4, 8)
"""Numbers of drafts whose acceptance is measured on held-out text; that of one is the agreement."""
MANY_EXITS = 16
"""Of a deeper model that many exits, evenly spaced, and those that the recipe names have it measured."""


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
        self.flops = model_flops(module.model)  # now, as an engine may take the matrices apart

    @classmethod
    def build(cls, recipe: Any, model: PreTrainedModel) -> Self:
        """The objective for a recipe whose `objective` is a LayerSkipConfig."""
        config: LayerSkipConfig = recipe.objective
        num_layers = model.config.get_text_config().num_hidden_layers
        _check_decode(recipe.evaluate.decode, num_layers)
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
        terms = self.module(
            batch["input_ids"], batch["labels"], batch["row"], step, position_ids=batch.get("position_ids")
        )
        if self.training:
            loss = terms.weighted_sum() / denominators["tokens"]
            counted = batch["labels"] != IGNORE_INDEX  # [batch, seq]
            tokens = counted.sum()
            metrics: Metrics = {f"exit_{e}/loss": (ce, tokens) for e, ce in terms.cross_entropy.items()}
            metrics |= self._in_force(batch["row"], counted.any(1), step)
            return loss, metrics | {"loss": (terms.cross_entropy[self.num_layers], tokens)}
        assert terms.tokens is not None
        last = terms.cross_entropy[self.num_layers]
        metrics = {"loss": (last, terms.tokens), "bits_per_token": (last / math.log(2.0), terms.tokens)}
        for exit_layer, cross_entropy in terms.cross_entropy.items():
            metrics[f"exit_{exit_layer}/loss"] = (cross_entropy, terms.tokens)
            metrics[f"exit_{exit_layer}/top1"] = (terms.correct[exit_layer], terms.tokens)
            metrics[f"exit_{exit_layer}/agreement"] = (terms.agreement[exit_layer], terms.tokens)
        return last, metrics | self._accepted(terms, batch)

    def _in_force(self, rows: list[int], counts: Tensor, step: int) -> Metrics:
        """What the schedules make of a step. `counts` [batch]: rows that are no mere filling."""
        metrics: Metrics = {}
        if dropout := self.module.dropout:
            rates = dropout.rates(step)
            metrics["layer_dropout/mean"] = (sum(rates) / len(rates), 1.0)
            metrics["layer_dropout/max"] = (max(rates), 1.0)
            dropped = torch.as_tensor((~dropout.kept(step, rows)).sum(0))
            skipped = dropped.to(counts.device, non_blocking=True)  # [batch]; the host goes on
            metrics["layer_dropout/skipped"] = ((skipped * counts).sum(), counts.sum() * self.num_layers)
        if self.module.exit_loss.exits:
            metrics["exits_on"] = (float(len(self.module.exit_loss.at(step))), 1.0)
        return metrics

    def _accepted(self, terms: LossTerms, batch: Batch) -> Metrics:
        """Drafts that the last layer would accept on the way through the held-out text."""
        counted, positions = batch["labels"] != IGNORE_INDEX, batch.get("position_ids")
        return {
            f"exit_{e}/accepted_{drafts}": accepted_drafts(terms.agreed[e], counted, drafts, positions)
            for e in self._drafting_exits()
            for drafts in HELDOUT_DRAFTS
        }

    def _drafting_exits(self) -> list[int]:
        spacing = math.ceil((self.num_layers - 1) / MANY_EXITS) or 1
        named = self.module.exit_loss.exits
        chosen = named if len(named) < self.num_layers else []  # all of them are none in particular
        return sorted({*range(spacing, self.num_layers, spacing), *chosen})

    def export(
        self, directory: Path, state: dict[str, Tensor], dtype: torch.dtype, heldout: dict[str, float]
    ) -> None:
        """A plain transformers checkpoint, as the released LayerSkip models are."""
        prefix = "module.model."
        weights = {
            name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
        }
        export_model(self.module.model, weights, directory, dtype)

    def decodable(self) -> PreTrainedModel:
        """The model itself; its intercepted layers run as they are outside of training."""
        return self.module.model

    def schedule(self, step: int) -> dict[str, list[float]]:
        """Each layer's dropout rate, and the weight of the loss at the exit after it, 0 where it is off."""
        dropout, weights = self.module.dropout, self.module.exit_loss.at(step)
        exits = range(1, self.num_layers + 1)
        return {
            "layer_dropout": [0.0] * self.num_layers if dropout is None else dropout.rates(step),
            "exit_weight": [weights.get(exit_layer, 0.0) for exit_layer in exits],
        }

    def in_words(self, step: int, metrics: dict[str, float]) -> str:
        """The exits that are on, with their losses if they are few, and the dropout rates."""
        words = []
        early = [e for e in self.module.exit_loss.at(step) if e < self.num_layers]
        if early:
            losses = " ".join(f"{e} ({metrics.get(f'exit_{e}/loss', math.nan):.2f})" for e in early)
            words.append(f"exits {losses if len(early) <= 4 else spans(early)}")
        if self.module.dropout is not None:
            rates = self.module.dropout.rates(step)
            words.append(f"dropout {sum(rates) / len(rates):.3f} to {max(rates):.3f}")
        return "  ".join(words)

    def step_flops(self, step: int, sequences: int, length: int) -> float:
        """Of the rows that each layer keeps, and of each exit that is on, as if every token were predicted."""
        dropout = self.module.dropout
        kept = [float(sequences)] * self.num_layers
        if dropout is not None:
            kept = dropout.kept(step, range(sequences)).sum(1).tolist()
        exits = len(self.module.exit_loss.at(step))
        return self.flops.step(kept, length, exits, float(sequences * length))

    def suggestion(
        self, heldout: dict[str, float], written: OwnText | None, fixed: dict[str, int]
    ) -> dict[str, Any]:
        """The exit and number of drafts with the best predicted speedup."""
        return suggested_self_speculation(self.num_layers, heldout, written, fixed)


def _check_decode(config: Any, num_layers: int) -> None:
    """Raises UserError for an exit to decode with that there is not."""
    exit_layer = None if config is None else config.exit_layer
    if exit_layer is not None and exit_layer >= num_layers:
        raise UserError(
            f"evaluate.decode.exit_layer: {exit_layer} is not an early exit of a model with {num_layers} layers; "
            f"use 1 to {num_layers - 1}"
        )


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers in few words: 1-4 8 12."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return " ".join(f"{g[0]}-{g[-1]}" if len(g) > 2 else " ".join(map(str, g)) for g in groups)
