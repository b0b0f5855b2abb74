"""EAGLE heads (arXiv 2401.15077) on a frozen model; EAGLE-2 (arXiv 2406.16858) drafts with the same."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.eagle import EagleHead
from layerskip_model.eagle_model import DraftTerms, EagleModel
from layerskip_model.layer_dropout import uniform_hash
from train.objectives.base import FINAL_STATES, Batch, States
from train.objectives.draft_layer import DraftLayerObjective, check_recipe, earlier_head, labels_of
from train.objectives.drafting import require_same
from train.objectives.eagle_config import EagleConfig
from train.section import Section


class Eagle(DraftLayerObjective[EagleConfig]):
    """The objective around `EagleModel`: SmoothL1 to the next features, and cross entropy to what the target says."""

    config_class: ClassVar[type[Section]] = EagleConfig
    strategy = "eagle2"

    def __init__(self, module: EagleModel, config: EagleConfig, base: str, seed: int) -> None:
        super().__init__(module, config, base, config.steps)
        self.seed = seed
        self.terms = ["regression", "cross_entropy"]
        self.weights = [config.regression, config.cross_entropy]

    @classmethod
    def build(cls, recipe: Any, model: PreTrainedModel) -> Self:
        """The objective for a recipe whose `objective` is an EagleConfig."""
        config: EagleConfig = recipe.objective
        check_recipe(recipe, config)
        backbone = Backbone(model)
        if config.init_heads is None:
            head = EagleHead(backbone, bias=config.bias)
        else:
            head = earlier_head(config, backbone, EagleHead)
            require_same(config, {"bias": head.fc.bias is not None})
        module = EagleModel(model, head, noise=config.noise, steps=config.steps)
        return cls(module, config, recipe.model.name_or_path, recipe.seed)

    def features(self) -> States:
        """The final states."""
        return States(FINAL_STATES, self.module.backbone.hidden_size)

    def states(self, batch: Batch) -> Tensor:
        """See `DraftLayerObjective.states`."""
        return self.module.backbone.final_states(batch["input_ids"], batch.get("position_ids"))

    def labels(self, batch: Batch) -> Tensor:
        """Both terms count at the same places."""
        return labels_of(batch, 1).expand(2, -1, -1)

    def drawn(self, batch: Batch, step: int) -> dict[str, Any]:
        """The noise of each row: the same on whichever rank and beside whichever rows, and after a resume."""
        draws = uniform_hash(self.seed, step, np.asarray(batch["row"], dtype=np.uint64))
        device = batch["input_ids"].device
        seeds = (draws * 2**53).astype(np.int64).tolist()
        return {"generators": [torch.Generator(device).manual_seed(seed) for seed in seeds]}

    def mean(self, found: DraftTerms) -> tuple[Tensor | float, Tensor | float]:
        """w_reg SmoothL1 + w_ce CE, a mean over places."""
        total = sum(weight * loss for weight, loss in zip(self.weights, found.losses, strict=True))
        return total, found.counts[0]

    def head_flops(self, counts: dict[str, int], tokens: int, length: int) -> float:
        """fc and the layer for all tokens, 6 a weight; the LM head is frozen, and run for what the target says too."""
        backbone = self.module.backbone
        fc = 8.0 * backbone.hidden_size**2  # nothing below it trains
        layer = 3.0 * self.flops.forward_layers[0] + self.flops.attention * length
        projected = 6.0 * backbone.vocab_size * backbone.hidden_size
        return tokens * (fc + layer) + counts["cross_entropy"] * projected
