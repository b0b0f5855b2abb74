"""What the objectives of EAGLE heads share: one layer that drafts step after step, trained beside a frozen model."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from eval.decoding.drafters.eagle import EagleDraft
from eval.decoding.growing import Shape
from eval.decoding.static_tree import TreeShape
from layerskip_model.backbone import Backbone
from layerskip_model.eagle import unrolled
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.eagle_model import DraftTerms, FrozenTarget
from layerskip_model.errors import UserError
from layerskip_model.formats.eagle import load_eagle, write_eagle
from layerskip_model.head_probe import Probe, is_in_one_place, take_probe
from layerskip_model.medusa import labels_ahead
from layerskip_model.runner import Runner
from train.metrics import Metrics
from train.objectives.base import Batch
from train.objectives.drafting import OWN, DraftingObjective, check_drafts, measured, place_of_earlier
from train.objectives.eagle_config import DraftLayerConfig

Config = TypeVar("Config", bound=DraftLayerConfig)
Head = TypeVar("Head")


class DraftLayerObjective(DraftingObjective[Config], Generic[Config]):
    """Base of the objectives around a `FrozenTarget`; step s of the head, from 1 on, guesses the token s + 1 places on.

    Attributes:
        weights: of each term.
    """

    part: ClassVar[str] = "head"
    length_key: ClassVar[str] = "steps"
    weights: list[float]

    def __init__(self, module: FrozenTarget[Any], config: Config, base: str, longest: int) -> None:
        super().__init__(module, config, base, longest)
        self.steps = [f"step_{step}" for step in range(1, longest + 1)]

    @abstractmethod
    def states(self, batch: Batch) -> Tensor:
        """What of the model the head learns from, as `features` has it, of a batch on the device."""

    @abstractmethod
    def head_flops(self, counts: dict[str, int], tokens: int, length: int) -> float:
        """Of the head alone in a step: so many tokens count in each term, of so many in rows of `length`."""

    def count(self, batch: Batch) -> dict[str, int]:
        """The places of each term."""
        return self.counts(batch)

    def forward(self, batch: Batch, step: int, denominators: dict[str, float]) -> tuple[Tensor, Metrics]:
        """The weighted sum of all terms, each over its own places.

        The metric `loss` is their weighted mean over all of these places.
        """
        if "labels" not in batch:
            return self.states(batch), {}
        over = [
            weight / denominators.get(term, 1.0)
            for weight, term in zip(self.weights, self.terms, strict=True)
        ]
        found: DraftTerms = self.module(
            batch["input_ids"],
            batch["labels"],
            over,
            batch.get("position_ids"),
            features=batch.get("features"),
            **self.drawn(batch, step),
        )
        metrics: Metrics = {
            f"{term}/loss": (loss, count)
            for term, loss, count in zip(self.terms, found.losses, found.counts, strict=True)
        }
        metrics["loss"] = self.mean(found)
        if found.measures is not None:
            metrics = measured(found.measures, [OWN, *self.steps]) | metrics
        return found.total, metrics

    def drawn(self, batch: Batch, step: int) -> dict[str, Any]:
        """What is random in a step, for the module's forward. Default: nothing."""
        return {}

    @abstractmethod
    def mean(self, found: DraftTerms) -> tuple[Tensor | float, Tensor | float]:
        """The metric `loss` as (sum, count)."""

    def run_beside(self, micro: int, length: int) -> list[Tensor]:
        """The head's layer, in as many steps as it trains for; losses over the vocabulary keep next to nothing."""
        head, hidden = self.module.head, self.module.backbone.hidden_size
        states = torch.zeros(micro, length - 1, hidden)
        entering = head.features([states] * 3) if isinstance(head, Eagle3Head) else states
        return list(unrolled(head, states, entering, None, len(set(self.terms) & set(self.steps)) or 1))

    def write_heads(
        self, directory: Path, state: dict[str, Tensor], *, dtype: torch.dtype, base_fingerprint: str
    ) -> None:
        """See `write_eagle`."""
        write_eagle(
            directory,
            self.module.head,
            state,
            dtype=dtype,
            backbone=self.module.backbone,
            base=self.base,
            base_fingerprint=base_fingerprint,
        )

    def probe(self, dtype: torch.dtype) -> Probe | None:
        """See `take_probe`; none where this process alone cannot run the module."""
        return take_probe(self.module, dtype) if is_in_one_place(self.module) else None

    def draft(self, name: str, tree: TreeShape, runner: Runner) -> EagleDraft:
        """See `DraftingObjective.draft`."""
        growth = Shape(self.longest, 1, self.longest)
        return EagleDraft.of(name, self.module.head, runner, tree=tree, growth=growth, number=self.longest)

    def in_words(self, step: int, metrics: dict[str, float]) -> str:
        """Each term."""
        named = [(term, f"{term}/loss") for term in self.terms]
        return "  ".join(
            f"{term.replace('_', ' ')} {metrics[name]:.3f}" for term, name in named if name in metrics
        )

    def step_flops(self, step: int, sequences: int, length: int) -> float:
        """The model's forward, where it runs, and the head's, as if every token were predicted."""
        counts = dict.fromkeys(self.terms, sequences * length)
        if self.has_features:
            return self.head_flops(counts, sequences * length, length)
        return self.flops_of(counts, sequences, length)

    def flops_of(self, counts: dict[str, int], sequences: int, length: int) -> float:
        """See `DraftingObjective.flops_of`."""
        of_model = self.flops.recomputed([float(sequences)] * len(self.flops.layers), length)
        return of_model + (self.head_flops(counts, sequences * length, length) if counts else 0.0)


def labels_of(batch: Batch, steps: int) -> Tensor:
    """The labels of a head's steps, [steps, batch, seq - 1]."""
    return labels_ahead(batch["labels"], steps, batch.get("position_ids"))[1:, :, :-1]


def check_recipe(recipe: Any, config: Any) -> None:
    """Raise UserError for what the parts of a recipe for an EAGLE head make impossible together."""
    check_drafts(recipe, config)
    if recipe.model.lora is not None:
        raise UserError(f"model.lora: objective.kind: {config.kind} trains a head alone; leave it out")
    if recipe.batch.length <= config.steps + 1:
        raise UserError(
            f"batch.length: {recipe.batch.length} leaves step {config.steps} nothing to predict; use more than "
            f"objective.steps: {config.steps} and 1"
        )


def earlier_head(config: DraftLayerConfig, backbone: Backbone, kind: type[Head]) -> Head:
    """The head that `init_heads` names. Raises UserError where it is none of that kind."""
    place = place_of_earlier(config)
    try:
        head = load_eagle(place, backbone)
    except UserError as error:
        raise UserError(f"objective.init_heads: {error}") from None
    if not isinstance(head, kind):
        raise UserError(
            f"objective.init_heads: '{config.init_heads}' is no head for objective.kind: {config.kind}; name another"
        )
    return head
