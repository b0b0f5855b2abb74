"""EAGLE-3 heads (arXiv 2503.01840) on a frozen model: training-time test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.eagle3 import Eagle3Head, feature_layers
from layerskip_model.eagle3_model import Eagle3Model
from layerskip_model.eagle_model import DraftTerms
from layerskip_model.errors import UserError
from layerskip_model.reduced_vocabulary import ReducedVocabulary, count_tokens
from layerskip_model.token_loss import IGNORE_INDEX
from train.data.packing import Rows
from train.metrics import Metrics
from train.objectives.base import FINAL_STATES, Batch, States
from train.objectives.draft_layer import DraftLayerObjective, check_recipe, earlier_head, labels_of
from train.objectives.drafting import require_same
from train.objectives.eagle_config import Eagle3Config
from train.section import Section

MISSING = "missing"  # labels that a reduced vocabulary does not have
ROWS_AT_ONCE = 256


class Eagle3(DraftLayerObjective[Eagle3Config]):
    """The objective around `Eagle3Model`: sum_s decay^s CE(target, draft in step s)."""

    config_class: ClassVar[type[Section]] = Eagle3Config
    strategy = "eagle3"

    def __init__(self, module: Eagle3Model, config: Eagle3Config, base: str) -> None:
        super().__init__(module, config, base, config.steps)
        self.terms = self.steps
        self.weights = [config.decay**step for step in range(config.steps)]
        self._sayable: Tensor | None = None  # the head's t2d on the host, where its vocabulary is reduced
        self._coverage = 1.0

    @classmethod
    def build(cls, recipe: Any, model: PreTrainedModel) -> Self:
        """The objective for a recipe whose `objective` is an Eagle3Config."""
        config: Eagle3Config = recipe.objective
        check_recipe(recipe, config)
        backbone = Backbone(model)
        if config.init_heads is None:
            vocabulary, reads = check_sizes(recipe, config, backbone)
            head = Eagle3Head(backbone, vocabulary, reads)
        else:
            head = earlier_head(config, backbone, Eagle3Head)
            theirs = {"draft_vocab_size": head.vocabulary.size, "feature_layers": list(head.reads)}
            given = {name for name in theirs if getattr(config, name) is not None}
            require_same(config, {name: theirs[name] for name in given})
        return cls(Eagle3Model(model, head, steps=config.steps), config, recipe.model.name_or_path)

    def rows(self, windows: Rows, part: Literal["train", "heldout"]) -> Rows:
        """The windows as they are; of those to train on the most frequent labels become the head's vocabulary."""
        head, backbone = self.module.head, self.module.backbone
        if part == "train" and not head.vocabulary.is_whole:
            counts = count_tokens(labels_in(windows), backbone.vocab_size)
            if self.config.init_heads is None:
                vocabulary = ReducedVocabulary.most_frequent(counts, head.vocabulary.size)
                head.begin_with(vocabulary, backbone)
            self._sayable = head.t2d.cpu()
            total, missing = float(counts.sum()), float(counts[~self._sayable].sum())
            head.vocabulary.require_labels(missing, total, "data.train")
            self._coverage = 1.0 - missing / max(total, 1.0)
        return super().rows(windows, part)

    def notes(self) -> list[str]:
        """How much of the data a reduced vocabulary can say."""
        if self._sayable is None:
            return []
        size, whole = self.module.head.vocabulary.size, len(self._sayable)
        return [f"the head says {size:,} of {whole:,} tokens, {self._coverage:.1%} of the training labels"]

    def count(self, batch: Batch) -> dict[str, int]:
        """Each step's labels, and how many of the first step's a reduced vocabulary misses.

        The first are what losses are divided by, an upper bound of the places that they are sums over: where the
        target's own first choice is missing a place is left out, as only the forward knows. So a vocabulary that
        covers less makes the loss smaller, not the places that are left louder.
        """
        counts = super().count(batch)
        if self._sayable is not None:
            first = self.labels(batch)[0]
            missing = ~self._sayable[first[first != IGNORE_INDEX]]
            counts[MISSING] = int(missing.sum())
        return counts

    def forward(self, batch: Batch, step: int, denominators: dict[str, float]) -> tuple[Tensor, Metrics]:
        """As every head's. Raises UserError for a global batch of which the vocabulary has no label."""
        if (counted := denominators.get(self.terms[0], 0.0)) > 1.0:  # which stands for none, too
            missing = denominators.get(MISSING, 0.0)
            self.module.head.vocabulary.require_labels(missing, counted, f"the batch of step {step + 1}")
        total, metrics = super().forward(batch, step, denominators)
        if not self.training and "labels" in batch and not self.module.head.vocabulary.is_whole:
            name = f"{self.terms[0]}/loss"
            metrics["coverage"] = (metrics[name][1], metrics[f"{self.terms[0]}/top1"][1])
        return total, metrics

    def features(self) -> States:
        """The inputs of three layers and the final states."""
        reads = "-".join(map(str, self.module.head.reads))
        return States(f"layers-{reads}-and-{FINAL_STATES}", 4 * self.module.backbone.hidden_size)

    def states(self, batch: Batch) -> Tensor:
        """See `DraftLayerObjective.states`."""
        return torch.cat(self.module.states(batch["input_ids"], batch.get("position_ids")), dim=-1)

    def labels(self, batch: Batch) -> Tensor:
        """Each step's."""
        return labels_of(batch, self.config.steps)

    def mean(self, found: DraftTerms) -> tuple[Tensor | float, Tensor | float]:
        """All steps as one (sum, count), each by its weight."""
        pairs = list(zip(self.weights, found.losses, found.counts, strict=True))
        return sum(w * loss for w, loss, _ in pairs), sum(w * count for w, _, count in pairs)

    def head_flops(self, counts: dict[str, int], tokens: int, length: int) -> float:
        """The layer for all tokens in every step, its LM head for what counts, the target's once for all steps."""
        backbone, head = self.module.backbone, self.module.head
        linears = [part for part in head.layer.modules() if isinstance(part, torch.nn.Linear)]
        layer = sum(6.0 * part.in_features * part.out_features for part in linears)
        attention = self.flops.attention * length
        fc = 4.0 * 3 * backbone.hidden_size**2  # nothing below it trains
        said = 6.0 * sum(counts[term] for term in self.terms) * head.vocabulary.size
        whole, reduced = backbone.vocab_size, 0 if head.vocabulary.is_whole else head.vocabulary.size
        target = 2.0 * counts[self.terms[0]] * (whole + reduced)
        counted = backbone.hidden_size * (said + target)
        return tokens * (fc + self.config.steps * (layer + attention)) + counted


def check_sizes(
    recipe: Any, config: Eagle3Config, backbone: Backbone
) -> tuple[ReducedVocabulary, tuple[int, int, int]]:
    """The vocabulary and layers of a new head. Raises UserError for those that this model or this data cannot have.

    Which tokens the vocabulary has is known when the data is: see `Eagle3.rows`.
    """
    whole = backbone.vocab_size
    size = config.draft_vocab_size or whole
    try:
        vocabulary = ReducedVocabulary.most_frequent(torch.zeros(whole), size)
        reads = feature_layers(backbone.num_layers, config.feature_layers)
    except UserError as error:
        raise UserError(f"objective.{error}") from None
    if size < whole and any(source.streaming for source in recipe.data.train):
        raise UserError(
            f"objective.draft_vocab_size: the {size:,} most frequent tokens are counted before the run, and a stream "
            "cannot be; set streaming: false, leave it out, or name a head that has them with objective.init_heads"
        )
    return vocabulary, reads


def labels_in(windows: Rows) -> Iterator[Tensor]:
    """The labels of all rows, many rows at a time."""
    for first in range(0, len(windows), ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, len(windows))
        yield torch.cat([windows[row]["labels"] for row in range(first, last)])
