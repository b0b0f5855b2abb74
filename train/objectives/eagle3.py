"""EAGLE-3 heads (arXiv 2503.01840) on a frozen model: training-time test."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.eagle3_model import Eagle3Model
from layerskip_model.eagle_model import DraftTerms
from layerskip_model.reduced_vocabulary import ReducedVocabulary, count_tokens
from train.data.packing import Rows
from train.objectives.base import FINAL_STATES, Batch, States
from train.objectives.draft_layer import DraftLayerObjective, check_recipe, earlier_head, labels_of
from train.objectives.eagle_config import Eagle3Config
from train.section import Section


class Eagle3(DraftLayerObjective[Eagle3Config]):
    """The objective around `Eagle3Model`: sum_s decay^s CE(target, draft in step s)."""

    config_class: ClassVar[type[Section]] = Eagle3Config
    strategy = "eagle3"

    def __init__(self, module: Eagle3Model, config: Eagle3Config, base: str) -> None:
        super().__init__(module, config, base, config.steps)
        self.terms = self.steps
        self.weights = [config.decay**step for step in range(config.steps)]

    @classmethod
    def build(cls, recipe: Any, model: PreTrainedModel) -> Self:
        """The objective for a recipe whose `objective` is an Eagle3Config."""
        config: Eagle3Config = recipe.objective
        check_recipe(recipe, config)
        backbone = Backbone(model)
        if config.init_heads is None:
            size = config.draft_vocab_size or backbone.vocab_size
            # Which tokens these are is known when the data is: see `rows`.
            vocabulary = ReducedVocabulary.most_frequent(torch.zeros(backbone.vocab_size), size)
            head = Eagle3Head(backbone, vocabulary, config.feature_layers)
        else:
            head = earlier_head(config, backbone, Eagle3Head)
        return cls(Eagle3Model(model, head, steps=config.steps), config, recipe.model.name_or_path)

    def rows(self, windows: Rows, part: Literal["train", "heldout"]) -> Rows:
        """The windows as they are; of those to train on the most frequent labels become the head's vocabulary."""
        config, head, backbone = self.config, self.module.head, self.module.backbone
        if part == "train" and config.draft_vocab_size is not None and config.init_heads is None:
            counts = count_tokens(
                (windows[row]["labels"] for row in range(len(windows))), backbone.vocab_size
            )
            head.begin_with(ReducedVocabulary.most_frequent(counts, config.draft_vocab_size), backbone)
        return super().rows(windows, part)

    def features(self) -> States:
        """The inputs of three layers and the final states."""
        reads = "-".join(map(str, self.module.head.reads))
        return States(f"layers-{reads}-and-{FINAL_STATES}", 4 * self.module.backbone.hidden_size)

    def states(self, batch: Batch) -> Tensor:
        """See `DraftLayerObjective.states`."""
        return torch.cat(self.module.states(batch["input_ids"], batch.get("position_ids")), dim=-1)

    def labels(self, batch: Batch) -> Tensor:
        """Each step's. Where the target's first choice is outside a reduced vocabulary the loss has fewer."""
        return labels_of(batch, self.config.steps)

    def mean(self, found: DraftTerms) -> tuple[Tensor | float, Tensor | float]:
        """All steps as one (sum, count), each by its weight."""
        pairs = list(zip(self.weights, found.losses, found.counts, strict=True))
        return sum(w * loss for w, loss, _ in pairs), sum(w * count for w, _, count in pairs)

    def head_flops(self, counts: dict[str, int], tokens: int, length: int) -> float:
        """The layer for all tokens in every step, its LM head and the target's over its vocabulary for what counts."""
        backbone, head = self.module.backbone, self.module.head
        linears = [part for part in head.layer.modules() if isinstance(part, torch.nn.Linear)]
        layer = sum(6.0 * part.in_features * part.out_features for part in linears)
        attention = self.flops.attention * length
        fc = 4.0 * 3 * backbone.hidden_size**2  # nothing below it trains
        said = 8.0 * head.vocabulary.size * backbone.hidden_size
        first = 0.0 if head.vocabulary.is_whole else 2.0 * backbone.vocab_size * backbone.hidden_size
        counted = sum(counts.values()) * said + counts[self.terms[0]] * first
        return tokens * (fc + self.config.steps * (layer + attention)) + counted
