"""What the objectives of drafting heads share: head k reads a state and predicts the token k + 1 places on."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.decoding.drafters.base import Drafter
from eval.decoding.drafters.heads import DraftHeads
from eval.decoding.static_tree import TreeShape
from eval.decoding.strategies import make_drafter
from eval.replay import OwnText
from layerskip_model.errors import UserError
from layerskip_model.formats.fingerprint import checkpoint_directory, fingerprint
from layerskip_model.formats.heads import heads_directory
from layerskip_model.head_terms import HeadMeasures, HeadTerms
from layerskip_model.medusa import labels_ahead
from layerskip_model.runner import Runner
from layerskip_model.token_loss import IGNORE_INDEX
from train.data.packing import Rows
from train.flops import model_flops
from train.metrics import Metrics
from train.objectives.base import FINAL_STATES, Batch, Objective, States
from train.objectives.heads_config import HeadsConfig
from train.objectives.self_speculation import COST_PER_ROW

OWN = "lm"  # the language model's own term

Config = TypeVar("Config", bound=HeadsConfig)


class HeadsObjective(Objective[Config], Generic[Config]):
    """Base of the objectives around a module that has `model`, `backbone` and `heads`; what is exported are the heads.

    Attributes:
        base: the model that the heads are for, as run.json and they name it.
        weights: of each term, the model's own first.
        learnt: what a head's term is called in training: `head_1/loss`.
    """

    learnt: str = "loss"

    def __init__(self, module: nn.Module, config: Config, base: str) -> None:
        super().__init__()
        self.module: Any = module
        self.config = config
        self.base = base
        self.flops = model_flops(self.module.model)  # now, as an engine may take the matrices apart
        self.weights = [1.0, *(config.decay**k for k in range(1, config.heads + 1))]
        self.terms = [OWN, *(f"head_{k}" for k in range(1, config.heads + 1))]

    @abstractmethod
    def heads_flops(self, counts: dict[str, int], tokens: int, length: int) -> float:
        """Of the heads alone in a step: so many tokens count in each term, of so many in rows of `length`."""

    @abstractmethod
    def write_heads(
        self, directory: Path, state: dict[str, Tensor], *, dtype: torch.dtype, base_fingerprint: str
    ) -> None:
        """Write them in their format into a directory that is there; `state` is their own state_dict."""

    def rows(self, windows: Rows, part: Literal["train", "heldout"]) -> Rows:
        """The windows as they are. Raises UserError where some head has nothing to learn in any of them."""
        missing = set(self.terms) if part == "train" and len(windows) else set()
        for row in range(len(windows)):
            if not missing:
                return windows
            batch = {key: values[None] for key, values in windows[row].items()}
            missing -= {term for term, count in self._counts(batch).items() if count}
        if missing:
            last = min(missing, key=self.terms.index)
            raise UserError(
                f"data.train: no label counts for {last}: no text has so many tokens that count; give longer ones, "
                f"a longer batch.length or fewer objective.heads than {self.config.heads}"
            )
        return windows

    def features(self) -> States | None:
        """The final states, where the model that makes them is frozen."""
        width = self.module.backbone.hidden_size
        return States(FINAL_STATES, width) if self.config.freezes_model else None

    def count(self, batch: Batch) -> dict[str, int]:
        """Each head has its own count, the model only where it trains."""
        counts = self._counts(batch)
        if self.config.freezes_model:
            del counts[OWN]
        return counts

    def _counts(self, batch: Batch) -> dict[str, int]:
        ahead = labels_ahead(batch["labels"], self.config.heads, batch.get("position_ids"))
        counts = (ahead != IGNORE_INDEX).flatten(1).sum(1).tolist()
        return dict(zip(self.terms, counts, strict=True))

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

    def _name(self, term: str) -> str:
        return f"{term}/{'loss' if term == OWN else self.learnt}"

    def _mean(self, metrics: Metrics, weights: list[float]) -> tuple[Tensor | float, Tensor | float]:
        """All terms that train as one (sum, count), each by its weight."""
        first = 1 if self.config.freezes_model else 0
        pairs = [metrics[self._name(term)] for term in self.terms[first:]]
        each = list(zip(weights[first:], pairs, strict=True))
        return sum(w * total for w, (total, _) in each), sum(w * count for w, (_, count) in each)

    def _measured(self, found: HeadMeasures, weights: list[float]) -> tuple[Tensor, Metrics]:
        """Each head's quality beside the LM head's own, over its own count."""
        metrics: Metrics = {}
        for k, term in enumerate(self.terms):
            count = found.counts[k]
            metrics[f"{term}/loss"] = (found.losses[k], count)
            metrics[f"{term}/top1"] = (found.top1[k], count)
            metrics[f"{term}/top5"] = (found.top5[k], count)
            if k:
                metrics[f"{term}/agreement"] = (found.agreement[k], count)
            if k and found.divergences is not None:
                metrics[f"{term}/divergence"] = (found.divergences[k - 1], count)
        metrics["acceptance_length"] = (found.accepted, found.places)
        metrics["loss"] = self._mean(metrics, weights)
        return found.losses[0], metrics

    def export(self, directory: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        """The heads."""
        self.write_heads(
            directory,
            inside(state, "module.heads."),
            dtype=dtype,
            base_fingerprint=fingerprint(checkpoint_directory(self.base)),
        )

    def exported_heads(self) -> str:
        """The export is nothing but the heads."""
        return "."

    def suggestion(
        self, heldout: dict[str, float], written: OwnText | None, fixed: dict[str, int]
    ) -> dict[str, Any]:
        """The heads' chain of first choices, as long as it pays.

        By decoding with every length of it; where nothing was written all of it, by its acceptance on held-out text.
        """
        kind, heads = self.config.kind, self.config.heads
        if written is None:
            speedup = heldout.get("acceptance_length", 1.0) / _cost(heads)
            return {"strategy": kind, "settings": {}, "predicted_speedup": speedup}
        depths = [min(fixed["num_speculations"], heads)] if fixed else range(1, heads + 1)
        tried = []
        for depth in depths:
            one: dict[str, Any] = {"strategy": kind, "settings": {"num_speculations": depth}}
            decoded = written.decoded(self.drafter(one, written.runner))
            won = [length for generation in decoded for length in generation.accepted_lengths]
            length = sum(won) / len(won) if won else 1.0
            one |= {"predicted_speedup": length / _cost(depth), "acceptance_length": length}
            tried.append(one)
        return max(tried, key=lambda one: one["predicted_speedup"])

    def decodable(self) -> PreTrainedModel:
        """The model that the heads are for."""
        return self.module.model

    @abstractmethod
    def draft(self, name: str, tree: TreeShape, runner: Runner) -> DraftHeads:
        """The heads in training, as decoding has them; `runner` runs their model. Raises UserError."""

    def drafter(self, suggestion: dict[str, Any], runner: Runner) -> Drafter:
        """The strategy with the heads in training, whose tree is a chain."""
        draft = self.draft("the heads in training", TreeShape.chain(self.config.heads), runner)
        return make_drafter(suggestion["strategy"], runner, draft=draft, **suggestion["settings"])

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
        """The same for so many tokens that count in each term. Without any: of the model alone."""
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


def _cost(depth: int) -> float:
    """Of verifying a chain so deep, over a pass of one row."""
    return 1.0 + COST_PER_ROW * depth


def inside(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state_dict that is one module's."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def check_fits(recipe: Any, config: HeadsConfig) -> None:
    """Raise UserError for what the parts of a recipe for heads make impossible together."""
    if recipe.model.name_or_path is None:
        raise UserError(
            f"objective.kind: {config.kind} trains heads of a model that exists; give model.name_or_path"
        )
    if recipe.batch.length <= config.heads:
        raise UserError(
            f"batch.length: {recipe.batch.length} leaves head {config.heads} nothing to predict; use more than "
            f"objective.heads: {config.heads}"
        )
    if recipe.evaluate.decode is not None and recipe.evaluate.decode.exit_layer is not None:
        raise UserError(
            f"evaluate.decode.exit_layer: objective.kind: {config.kind} drafts with its heads; leave it out"
        )


def place_of_earlier(config: HeadsConfig) -> Path:
    """Where the heads lie that `init_heads` names. Raises UserError for a run that trained none."""
    assert config.init_heads is not None
    try:
        return heads_directory(config.init_heads)
    except UserError as error:
        raise UserError(f"objective.init_heads: {error}") from None


def require_same(config: HeadsConfig, theirs: dict[str, Any]) -> None:
    """Refuse a recipe for other heads than those that it begins from, whose settings are `theirs`."""
    for name, value in theirs.items():
        if getattr(config, name) != value:
            raise UserError(
                f"objective.{name}: {getattr(config, name)}, and the heads of init_heads '{config.init_heads}' have "
                f"{value}; give that"
            )
