"""Medusa heads (arXiv 2401.10774): on a frozen model (Medusa-1), or together with it (Medusa-2)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.decoding.drafters.medusa import MedusaDraft
from eval.decoding.static_tree import TreeShape
from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats.fingerprint import fingerprint
from layerskip_model.formats.medusa import load_medusa, write_medusa
from layerskip_model.formats.record import Record, write_record
from layerskip_model.head_terms import HeadMeasures, HeadTerms
from layerskip_model.lora import has_lora
from layerskip_model.medusa import MedusaHeads
from layerskip_model.medusa_model import MedusaModel
from layerskip_model.runner import Runner
from train.export import export_model
from train.metrics import Metrics
from train.objectives.base import Batch
from train.objectives.drafting import OWN, inside, place_of_earlier, require_same
from train.objectives.heads import HeadsObjective, check_fits
from train.objectives.medusa_config import MedusaConfig
from train.section import Section

HEADS_NAME = "heads"  # in the export, beside a model that was trained with them


class Medusa(HeadsObjective[MedusaConfig]):
    """The objective around `MedusaModel`; what is exported are the heads, and the model where it trains."""

    config_class: ClassVar[type[Section]] = MedusaConfig

    def __init__(self, module: MedusaModel, config: MedusaConfig, base: str, total_steps: int) -> None:
        super().__init__(module, config, base)
        self.total_steps = total_steps

    @classmethod
    def build(cls, recipe: Any, model: PreTrainedModel) -> Self:
        """The objective for a recipe whose `objective` is a MedusaConfig."""
        config: MedusaConfig = recipe.objective
        check_fits(recipe, config)
        if config.freezes_model and recipe.model.lora is not None:
            raise UserError(
                "model.lora: adapters train with objective.stage: joint; with stage: heads leave it out"
            )
        backbone = Backbone(model)
        if config.init_heads is None:
            heads = MedusaHeads.new(
                backbone, heads=config.heads, layers=config.layers, shared=config.shared_projection
            )
        else:
            heads = _earlier_heads(config, backbone)
        if config.self_distillation and not has_lora(model):
            raise UserError(
                "objective.self_distillation: the teacher is the model without its adapters; add model.lora"
            )
        module = MedusaModel(model, heads, frozen=config.freezes_model)
        own = str(Path(recipe.output_dir) / "export")
        return cls(
            module, config, recipe.model.name_or_path if config.freezes_model else own, recipe.total_steps
        )

    def learning_rate_multiple(self, name: str) -> float:
        """Beside a model that trains the heads get a multiple, all of their parameters."""
        is_head = name.startswith("module.heads.")
        return self.config.head_lr_multiple if is_head and not self.config.freezes_model else 1.0

    def forward(self, batch: Batch, step: int, denominators: dict[str, float]) -> tuple[Tensor, Metrics]:
        """CE_lm + lambda_0 sum_k lambda_k CE_k, of a frozen model the sum alone; each term over its own tokens."""
        loss, metrics = super().forward(batch, step, denominators)
        if not self.config.freezes_model and self.training:
            metrics["lambda_0"] = (self.scale(step), 1.0)
        elif not self.config.freezes_model:
            total, count = metrics[f"{OWN}/loss"]
            metrics["bits_per_token"] = (total / math.log(2.0), count)
        return loss, metrics

    def run_module(self, batch: Batch, weights: list[float]) -> HeadTerms | HeadMeasures:
        """See `MedusaModel.forward`."""
        return self.module(
            batch["input_ids"],
            batch["labels"],
            weights,
            batch.get("position_ids"),
            distil=self.config.self_distillation,
            features=batch.get("features"),
        )

    def weights_at(self, step: int) -> list[float]:
        """lambda_0 lambda_k, and 1 for the model."""
        scale = self.scale(step)
        return [self.weights[0], *(scale * weight for weight in self.weights[1:])]

    def scale(self, step: int) -> float:
        """What the heads' losses are multiplied with at a step: 1 on a frozen model, else lambda_0 and its ramp."""
        if self.config.freezes_model:
            return 1.0
        ramp = math.sin(0.5 * math.pi * step / self.total_steps) if self.config.ramp == "sine" else 1.0
        return self.config.lambda_0 * ramp

    def export(
        self, directory: Path, state: dict[str, Tensor], dtype: torch.dtype, heldout: dict[str, float]
    ) -> None:
        """The heads; of a model that trained it as a plain checkpoint, and they in a folder inside."""
        if self.config.freezes_model:
            return super().export(directory, state, dtype, heldout)
        export_model(self.module.model, inside(state, "module.model."), directory, dtype)
        place = directory / HEADS_NAME
        place.mkdir()
        heads = inside(state, "module.heads.")
        self.write_heads(place, heads, dtype=dtype, base_fingerprint=fingerprint(directory))
        write_record(place, Record.of(heldout, self.probe(dtype)))

    def write_heads(
        self, directory: Path, state: dict[str, Tensor], *, dtype: torch.dtype, base_fingerprint: str
    ) -> None:
        """See `write_medusa`."""
        write_medusa(
            directory,
            self.module.heads,
            state,
            dtype=dtype,
            base=self.base,
            base_fingerprint=base_fingerprint,
        )

    def draft(self, name: str, tree: TreeShape, runner: Runner) -> MedusaDraft:
        """See `HeadsObjective.draft`."""
        return MedusaDraft(name, self.module.heads, self.config.heads, tree)

    def exported_heads(self) -> str:
        """The export is nothing but the heads, unless the model trained too."""
        return "." if self.config.freezes_model else HEADS_NAME

    def in_words(self, step: int, metrics: dict[str, float]) -> str:
        """Each term's loss, and lambda_0 where there is one."""
        words = super().in_words(step, metrics)
        return words if self.config.freezes_model else f"{words}  lambda_0 {self.scale(step):.3f}"

    def heads_flops(self, counts: dict[str, int], tokens: int, length: int) -> float:
        """A weight costs 6 for each token, and 4 where nothing below it trains.

        Blocks see what counts for some head, which is about what counts for the first.
        """
        config = self.config
        block = float(self.module.backbone.hidden_size**2)
        first = 4.0 if config.freezes_model else 6.0
        blocks = config.heads * (first + 6.0 * (config.layers - 1)) * block * counts.get("head_1", 0)
        return blocks + self.projections_flops(counts, 6.0)


def _earlier_heads(config: MedusaConfig, backbone: Backbone) -> MedusaHeads:
    """The heads that `init_heads` names. Raises UserError where they are not those that the recipe is for."""
    heads = load_medusa(place_of_earlier(config), backbone)
    require_same(config, {"heads": heads.number, "layers": heads.layers, "shared_projection": heads.shared})
    return heads
