"""Hydra and Hydra++ heads (arXiv 2402.05109) on a frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.decoding.drafters.hydra import HydraDraft
from eval.decoding.static_tree import TreeShape
from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats.hydra import load_hydra, read_hydra, write_hydra
from layerskip_model.hydra import HydraHeads
from layerskip_model.hydra_model import HydraModel
from layerskip_model.runner import Runner
from train.objectives.drafting import place_of_earlier, require_same
from train.objectives.heads import HeadsObjective, check_fits
from train.objectives.hydra_config import HydraConfig
from train.section import Section


class Hydra(HeadsObjective[HydraConfig]):
    """The objective around `HydraModel`; what is exported are the heads."""

    config_class: ClassVar[type[Section]] = HydraConfig

    def __init__(self, module: HydraModel, config: HydraConfig, base: str) -> None:
        super().__init__(module, config, base)
        self.learnt = "divergence" if config.loss == "teacher" else "loss"

    @classmethod
    def build(cls, recipe: Any, model: PreTrainedModel) -> Self:
        """The objective for a recipe whose `objective` is a HydraConfig."""
        config: HydraConfig = recipe.objective
        check_fits(recipe, config)
        if recipe.model.lora is not None:
            raise UserError("model.lora: objective.kind: hydra trains heads alone; leave it out")
        backbone = Backbone(model)
        if config.init_heads is None:
            heads = HydraHeads.new(
                backbone,
                heads=config.heads,
                layers=config.layers,
                prefix_attention=config.prefix_attention,
                shared=config.shared_projection,
                dropout=config.dropout,
            )
        else:
            heads = _earlier_heads(config, backbone)
        return cls(HydraModel(model, heads, loss=config.loss), config, recipe.model.name_or_path)

    def draft(self, name: str, tree: TreeShape, runner: Runner) -> HydraDraft:
        """See `HeadsObjective.draft`."""
        return HydraDraft.of(name, self.module.heads, tree, runner)

    def write_heads(
        self, directory: Path, state: dict[str, Tensor], *, dtype: torch.dtype, base_fingerprint: str
    ) -> None:
        """See `write_hydra`."""
        write_hydra(
            directory,
            self.module.heads,
            state,
            dtype=dtype,
            base=self.base,
            base_fingerprint=base_fingerprint,
        )

    def heads_flops(self, counts: dict[str, int], tokens: int, length: int) -> float:
        """A weight costs 6 for each token, and 4 where nothing below it trains; the teacher's LM head 2.

        Blocks see what counts for some head, which is about what counts for the first; the prefix layer sees all.
        """
        config = self.config
        block = float(self.module.backbone.hidden_size**2)
        first = 6.0 if config.prefix_attention else 4.0
        inputs = sum(index + 2 for index in range(config.heads))
        of_heads = 2.0 * first * inputs + 6.0 * (config.layers - 1) * config.heads
        blocks = of_heads * block * counts.get("head_1", 0)
        layer = 3.0 * self.flops.forward_layers[0] + self.flops.attention * length
        prefix = tokens * layer if config.prefix_attention else 0.0
        return prefix + blocks + self.projections_flops(counts, 8.0 if config.loss == "teacher" else 6.0)


def _earlier_heads(config: HydraConfig, backbone: Backbone) -> HydraHeads:
    """The heads that `init_heads` names. Raises UserError where they are not those that the recipe is for."""
    place = place_of_earlier(config)
    stored = read_hydra(place)
    theirs = {
        "heads": stored.number,
        "layers": stored.layers,
        "prefix_attention": stored.has_prefix,
        "shared_projection": stored.shared,
    }
    require_same(config, theirs)
    heads = load_hydra(place, backbone)
    heads.dropout = config.dropout
    return heads
