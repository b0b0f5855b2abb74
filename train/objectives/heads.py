"""What the objectives of drafting heads share: head k reads a state and predicts the token k + 1 places on."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from layerskip_model.errors import UserError
from layerskip_model.head_terms import HeadMeasures, HeadTerms
from layerskip_model.medusa import labels_ahead
from train.metrics import Metrics
from train.objectives.base import FINAL_STATES, Batch, States
from train.objectives.drafting import OWN, DraftingObjective, check_drafts, measured
from train.objectives.heads_config import HeadsConfig

Config = TypeVar("Config", bound=HeadsConfig)


class HeadsObjective(DraftingObjective[Config], Generic[Config]):
    """Base of the objectives around a module that has `model`, `backbone` and `heads`; what is exported are the heads.

    Attributes:
        weights: of each term, the model's own first.
        learnt: what a head's term is called in training: `head_1/loss`.
    """

    part: ClassVar[str] = "heads"
    length_key: ClassVar[str] = "heads"
    learnt: str = "loss"

    def __init__(self, module: nn.Module, config: Config, base: str) -> None:
        super().__init__(module, config, base, config.heads)
        self.strategy = config.kind
        self.weights = [1.0, *(config.decay**k for k in range(1, config.heads + 1))]
        self.terms = [OWN, *(f"head_{k}" for k in range(1, config.heads + 1))]

    @abstractmethod
    def heads_flops(self, counts: dict[str, int], tokens: int, length: int) -> float:
        """Of the heads alone in a step: so many tokens count in each term, of so many in rows of `length`."""

    def features(self) -> States | None:
        """The final states, where the model that makes them is frozen."""
        width = self.module.backbone.hidden_size
        return States(FINAL_STATES, width) if self.config.freezes_model else None

    def count(self, batch: Batch) -> dict[str, int]:
        """Each head has its own count, the model only where it trains."""
        counts = self.counts(batch)
        if self.config.freezes_model:
            del counts[OWN]
        return counts

    def labels(self, batch: Batch) -> Tensor:
        """Each head's, the model's own first."""
        return labels_ahead(batch["labels"], self.config.heads, batch.get("position_ids"))

    def forward(self, batch: Batch, step: int, denominators: dict[str, float]) -> tuple[Tensor, Metrics]:
        """The weighted sum of all terms, each over its own tokens.

        The metric `loss` is the mean over all of these tokens, weighted alike, as sums over several counts need it.
        """
        if "labels" not in batch:
            return self.module.backbone.final_states(batch["input_ids"], batch.get("position_ids")), {}
        weights = self.weights_at(step)
        over = [
            weight / denominators.get(term, 1.0) for weight, term in zip(weights, self.terms, strict=True)
        ]
        found = self.run_module(batch, over)
        if isinstance(found, HeadMeasures):
            return self._measured(found, weights)
        metrics: Metrics = {
            self._name(term): (loss, count)
            for term, loss, count in zip(self.terms, found.losses, found.counts, strict=True)
            if loss is not None
        }
        return found.total, metrics | {"loss": self._mean(metrics, weights)}

    def run_module(self, batch: Batch, weights: list[float]) -> HeadTerms | HeadMeasures:
        """The module's forward; `weights` are those of the sums of each term."""
        return self.module(
            batch["input_ids"],
            batch["labels"],
            weights,
            batch.get("position_ids"),
            features=batch.get("features"),
        )

    def weights_at(self, step: int) -> list[float]:
        """Of each term at a step."""
        return self.weights

    def _mean(self, metrics: Metrics, weights: list[float]) -> tuple[Tensor | float, Tensor | float]:
        """All terms that train as one (sum, count), each by its weight."""
        first = 1 if self.config.freezes_model else 0
        pairs = [metrics[self._name(term)] for term in self.terms[first:]]
        each = list(zip(weights[first:], pairs, strict=True))
        return sum(w * total for w, (total, _) in each), sum(w * count for w, (_, count) in each)

    def _name(self, term: str) -> str:
        return f"{term}/{'loss' if term == OWN else self.learnt}"

    def _measured(self, found: HeadMeasures, weights: list[float]) -> tuple[Tensor, Metrics]:
        """Each head's quality beside the LM head's own, over its own count."""
        metrics = measured(found, self.terms)
        return found.losses[0], metrics | {"loss": self._mean(metrics, weights)}

    def in_words(self, step: int, metrics: dict[str, float]) -> str:
        """Each term as it is learnt."""
        names = [(term, self._name(term)) for term in self.terms]
        return "  ".join(f"{term} {metrics[name]:.2f}" for term, name in names if name in metrics)

    def step_flops(self, step: int, sequences: int, length: int) -> float:
        """The model's, forward alone where it is frozen, and the heads', as if every token were predicted."""
        counts = dict.fromkeys(self.terms, sequences * length)
        if self.has_features:
            return self.heads_flops(counts, sequences * length, length)
        return self.flops_of(counts, sequences, length)

    def flops_of(self, counts: dict[str, int], sequences: int, length: int) -> float:
        """See `DraftingObjective.flops_of`."""
        rows = [float(sequences)] * len(self.flops.layers)
        if self.config.freezes_model:
            of_model = self.flops.recomputed(rows, length)
        else:
            of_model = self.flops.step(rows, length, 1, float(counts.get(OWN, 0)))
        return of_model + (self.heads_flops(counts, sequences * length, length) if counts else 0.0)

    def projections_flops(self, counts: dict[str, int], each: float) -> float:
        """`each` for every weight of a projection, over the tokens that count in every head's term."""
        backbone = self.module.backbone
        projected = sum(counts.get(term, 0) for term in self.terms[1:])
        return each * backbone.vocab_size * backbone.hidden_size * projected


def check_fits(recipe: Any, config: HeadsConfig) -> None:
    """Raise UserError for what the parts of a recipe for heads make impossible together."""
    check_drafts(recipe, config)
    if recipe.batch.length <= config.heads:
        raise UserError(
            f"batch.length: {recipe.batch.length} leaves head {config.heads} nothing to predict; use more than "
            f"objective.heads: {config.heads}"
        )
