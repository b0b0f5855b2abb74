"""Medusa heads (arXiv 2401.10774): on a frozen model (Medusa-1), or together with it (Medusa-2)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.replay import OwnText
from eval.target import open_run
from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats.fingerprint import checkpoint_directory, fingerprint
from layerskip_model.formats.medusa import load_medusa, read_config, write_medusa
from layerskip_model.lora import has_lora
from layerskip_model.medusa import MedusaHeads, labels_ahead
from layerskip_model.medusa_model import MedusaMeasures, MedusaModel, MedusaTerms
from layerskip_model.token_loss import IGNORE_INDEX
from train.data.packing import Rows
from train.export import export_model
from train.flops import model_flops
from train.metrics import Metrics
from train.objectives.base import Batch, Objective
from train.objectives.medusa_config import MedusaConfig
from train.objectives.self_speculation import COST_PER_ROW
from train.section import Section

HEADS_NAME = "heads"  # in the export, beside a model that was trained with them
OWN = "lm"  # the language model's own term


class Medusa(Objective[MedusaConfig]):
    """The objective around `MedusaModel`; what is exported are the heads, and the model where it trains."""

    config_class: ClassVar[type[Section]] = MedusaConfig

    def __init__(self, module: MedusaModel, config: MedusaConfig, base: str, total_steps: int) -> None:
        super().__init__()
        self.module = module
        self.config = config
        self.base = base  # the model that the heads are for: the recipe's, or what will be exported
        self.total_steps = total_steps
        self.flops = model_flops(module.model)  # now, as an engine may take the matrices apart
        self.weights = [1.0, *(config.decay**k for k in range(1, config.heads + 1))]  # of each term
        self.terms = [OWN, *(f"head_{k}" for k in range(1, config.heads + 1))]

    @classmethod
    def build(cls, recipe: Any, model: PreTrainedModel) -> Self:
        """The objective for a recipe whose `objective` is a MedusaConfig."""
        config: MedusaConfig = recipe.objective
        _check_fits(recipe, config)
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
        """CE_lm + lambda_0 sum_k lambda_k CE_k, of a frozen model the sum alone; each term over its own tokens.

        The metric `loss` is the mean over all of these tokens, weighted alike, as sums over several counts need it.
        """
        scale = self.scale(step)
        weights = [self.weights[0], *(scale * weight for weight in self.weights[1:])]
        over = [
            weight / denominators.get(term, 1.0) for weight, term in zip(weights, self.terms, strict=True)
        ]
        found = self.module(
            batch["input_ids"],
            batch["labels"],
            over,
            batch.get("position_ids"),
            distil=self.config.self_distillation,
        )
        if isinstance(found, MedusaMeasures):
            return self._measured(found, weights)
        assert isinstance(found, MedusaTerms)
        metrics: Metrics = {
            f"{term}/loss": (loss, count)
            for term, loss, count in zip(self.terms, found.losses, found.counts, strict=True)
            if loss is not None
        }
        if not self.config.freezes_model:
            metrics["lambda_0"] = (scale, 1.0)
        return found.total, metrics | {"loss": self._mean(metrics, weights)}

    def scale(self, step: int) -> float:
        """What the heads' losses are multiplied with at a step: 1 on a frozen model, else lambda_0 and its ramp."""
        if self.config.freezes_model:
            return 1.0
        ramp = math.sin(0.5 * math.pi * step / self.total_steps) if self.config.ramp == "sine" else 1.0
        return self.config.lambda_0 * ramp

    def _mean(self, metrics: Metrics, weights: list[float]) -> tuple[Tensor | float, Tensor | float]:
        """All terms that train as one (sum, count), each by its weight."""
        first = 1 if self.config.freezes_model else 0
        pairs = [metrics[f"{term}/loss"] for term in self.terms[first:]]
        each = list(zip(weights[first:], pairs, strict=True))
        return sum(w * total for w, (total, _) in each), sum(w * count for w, (_, count) in each)

    def _measured(self, found: MedusaMeasures, weights: list[float]) -> tuple[Tensor, Metrics]:
        """Each head's quality beside the LM head's own, over its own count."""
        metrics: Metrics = {}
        for k, term in enumerate(self.terms):
            count = found.counts[k]
            metrics[f"{term}/loss"] = (found.losses[k], count)
            metrics[f"{term}/top1"] = (found.top1[k], count)
            metrics[f"{term}/top5"] = (found.top5[k], count)
            if k:
                metrics[f"{term}/agreement"] = (found.agreement[k], count)
        metrics["acceptance_length"] = (found.accepted, found.places)
        metrics["loss"] = self._mean(metrics, weights)
        if not self.config.freezes_model:
            metrics["bits_per_token"] = (found.losses[0] / math.log(2.0), found.counts[0])
        return found.losses[0], metrics

    def export(self, directory: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        """The heads; of a model that trained it as a plain checkpoint, and they in a folder inside."""
        place, model = directory, directory
        if self.config.freezes_model:
            model = checkpoint_directory(self.base)
        else:
            export_model(self.module.model, _inside(state, "module.model."), directory, dtype)
            place = directory / HEADS_NAME
            place.mkdir()
        heads, weights = _inside(state, "module.heads."), fingerprint(model)
        write_medusa(place, self.module.heads, heads, dtype=dtype, base=self.base, base_fingerprint=weights)

    def exported_heads(self) -> str:
        """The export is nothing but the heads, unless the model trained too."""
        return "." if self.config.freezes_model else HEADS_NAME

    def suggestion(
        self, heldout: dict[str, float], written: OwnText | None, fixed: dict[str, int]
    ) -> dict[str, Any]:
        """The heads' chain of first choices, by its acceptance on held-out text."""
        cost = 1.0 + COST_PER_ROW * self.config.heads
        speedup = heldout.get("acceptance_length", 1.0) / cost
        return {"strategy": "medusa", "settings": {}, "predicted_speedup": speedup}

    def in_words(self, step: int, metrics: dict[str, float]) -> str:
        """Each term's loss, and lambda_0 where there is one."""
        words = [f"{term} {metrics[f'{term}/loss']:.2f}" for term in self.terms if f"{term}/loss" in metrics]
        if not self.config.freezes_model:
            words.append(f"lambda_0 {self.scale(step):.3f}")
        return "  ".join(words)

    def step_flops(self, step: int, sequences: int, length: int) -> float:
        """The model's, forward alone where it is frozen, and the heads', as if every token were predicted."""
        return self.flops_of(dict.fromkeys(self.terms, sequences * length), sequences, length)

    def flops_of(self, counts: dict[str, int], sequences: int, length: int) -> float:
        """The same for so many tokens that count in each term: a weight costs 6, and 4 where nothing below it trains.

        Blocks see what counts for some head, which is about what counts for the first.
        """
        backbone, config = self.module.backbone, self.config
        block = float(backbone.hidden_size**2)
        first = 4.0 if config.freezes_model else 6.0
        blocks = config.heads * (first + 6.0 * (config.layers - 1)) * block * counts.get("head_1", 0)
        projected = sum(counts.get(term, 0) for term in self.terms[1:])
        of_heads = blocks + 6.0 * backbone.vocab_size * backbone.hidden_size * projected
        rows = [float(sequences)] * len(self.flops.layers)
        if config.freezes_model:
            return self.flops.recomputed(rows, length) + of_heads
        return self.flops.step(rows, length, 1, float(counts.get(OWN, 0))) + of_heads


def _inside(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state_dict that is one module's."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _check_fits(recipe: Any, config: MedusaConfig) -> None:
    """Raise UserError for what the parts of a recipe make impossible together."""
    if recipe.model.name_or_path is None:
        raise UserError("objective.kind: medusa trains heads of a model that exists; give model.name_or_path")
    if config.freezes_model and recipe.model.lora is not None:
        raise UserError(
            "model.lora: adapters train with objective.stage: joint; with stage: heads leave it out"
        )
    if recipe.batch.length <= config.heads:
        raise UserError(
            f"batch.length: {recipe.batch.length} leaves head {config.heads} nothing to predict; use more than "
            f"objective.heads: {config.heads}"
        )
    if recipe.evaluate.decode is not None:
        raise UserError(
            "evaluate.decode: Medusa heads are not decoded with while they train; remove the section"
        )


def _earlier_heads(config: MedusaConfig, backbone: Backbone) -> MedusaHeads:
    """The heads that `init_heads` names. Raises UserError where they are not those that the recipe is for."""
    assert config.init_heads is not None
    place = Path(config.init_heads)
    if (place / "run.json").is_file():
        heads = open_run(place).heads
        if heads is None:
            raise UserError(f"objective.init_heads: the run '{place}' trained no heads; name one that did")
        place = heads
    stored = read_config(place)
    theirs = {
        "heads": stored["medusa_num_heads"],
        "layers": stored["medusa_num_layers"],
        "shared_projection": bool(stored.get("shared_projection", False)),
    }
    for name, value in theirs.items():
        if getattr(config, name) != value:
            raise UserError(
                f"objective.{name}: {getattr(config, name)}, and the heads of init_heads '{config.init_heads}' have "
                f"{value}; give that"
            )
    return load_medusa(place, backbone)
