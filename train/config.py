"""The recipe: one strict, typed YAML file a run. Every key is described here; docs/recipes.md is made from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from layerskip_model.errors import UserError
from train.data.sources import DataConfig
from train.model_config import ModelConfig
from train.objectives import OBJECTIVES
from train.optimizer_config import OptimizerConfig, ScheduleConfig
from train.recipe_errors import describe, nearest, shorten
from train.recipe_file import read_recipe_file
from train.section import FrozenModelSection, Section


class BatchConfig(Section):
    """The global batch, which the program splits over ranks and accumulation."""

    sequences: int = Field(
        ge=1, description="sequences an optimizer step, over all ranks; neither they nor micro need divide it"
    )
    length: int = Field(ge=2, description="tokens a sequence")
    micro: int | None = Field(None, ge=1, description="sequences a forward on one rank; default: all at once")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.micro is not None and self.micro > self.sequences:
            raise ValueError(f"micro: {self.micro} is more than sequences: {self.sequences}")
        return self


class WandbConfig(Section):
    """Weights & Biases (pip install wandb)."""

    project: str = Field(min_length=1, description="the project that the run belongs to")
    name: str | None = Field(None, description="of the run; default: wandb makes one up")
    mode: Literal["online", "offline"] | None = Field(
        None, description="offline: synchronise later; default: WANDB_MODE of the environment, or online"
    )


class LogConfig(Section):
    """Where metrics go besides the terminal and OUTPUT_DIR/log.jsonl."""

    every: int = Field(10, ge=1, description="optimizer steps")
    peak_tflops: float | None = Field(
        None, gt=0.0, description="of one device, for the FLOPs utilisation; default: known for many GPUs"
    )
    wandb: WandbConfig | None = Field(None, description="default: not used")


class CheckpointConfig(Section):
    """Checkpoints to resume from; the newest complete one is used when the command is run again."""

    every: int | None = Field(
        None, ge=1, description="optimizer steps; default: only when interrupted and at the end"
    )
    keep: int = Field(2, ge=1, description="how many to keep, beside the one that heads are exported from")


class DecodeConfig(Section):
    """A short greedy decode of held-out prompts with the model in training, against autoregressive decoding."""

    prompts: int = Field(8, ge=1, description="held-out prompts")
    new_tokens: int = Field(64, ge=2, description="tokens a prompt")
    num_speculations: int = Field(4, ge=1, description="drafts a verification; of heads at most one each")
    exit_layer: int | None = Field(
        None, ge=1, description="exit that drafts; default: the best for the text that the model writes"
    )


class EvaluateConfig(Section):
    """Held-out evaluation, of every exit; one more follows the last step."""

    every: int | None = Field(None, ge=1, description="optimizer steps; default: only at the end")
    sequences: int | None = Field(None, ge=1, description="evaluate on that many; default: all")
    decode: DecodeConfig | None = Field(
        None,
        description="decode at every checkpoint; heads are exported from the one that drafts best; "
        "default: only at the end, for the suggestion in run.json",
    )


class FeaturesConfig(Section):
    """The frozen model's states computed once, before the training, and kept for other runs too."""

    cache: str = Field(
        min_length=1, description="the directory that keeps them; one model's, of one data section and length"
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="they are rounded to it; lossless where model.dtype is the same"
    )


O = TypeVar("O", bound=Section)  # noqa: E741


class Recipe(Section, Generic[O]):
    """One run. `objective` belongs to the method; everything else reads alike in every recipe."""

    output_dir: str = Field(min_length=1, description="where the run is kept; made if needed")
    seed: int = Field(0, ge=0, lt=2**32, description="of weights, order of the data and layer dropout")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; or max_tokens, or epochs")
    max_tokens: int | None = Field(None, ge=1, description="length of the run in training tokens")
    epochs: float | None = Field(None, gt=0.0, description="length of the run in passes over the data")
    batch: BatchConfig
    model: ModelConfig
    data: DataConfig
    features: FeaturesConfig | None = Field(
        None, description="default: a frozen model runs in every step anew"
    )
    objective: SerializeAsAny[O] = Field(description="the method; see its kinds")
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        lengths = {name: getattr(self, name) for name in ("max_steps", "max_tokens", "epochs")}
        given = [f"{name}: {value}" for name, value in lengths.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of max_steps, max_tokens and epochs, not {', '.join(given) or 'none'}"
            )
        if self.epochs is not None and any(source.streaming for source in self.data.train):
            raise ValueError(
                f"epochs: {self.epochs:g} with a streaming source, whose length nobody knows; "
                "give max_steps or max_tokens"
            )
        if self.epochs is None:
            self._check_warmup(self._steps(num_sequences=0))
        return self

    @model_validator(mode="after")
    def _model_fits(self) -> Self:
        is_frozen = isinstance(self.objective, FrozenModelSection) and self.objective.freezes_model
        frozen = self.model.lora is not None or is_frozen
        if self.model.quantization is not None and (not is_frozen or self.model.lora is not None):
            raise ValueError(
                f"model.quantization: {self.model.quantization} is for a model that stays as it is, and this "
                "objective trains it; leave it out"
            )
        if self.model.dtype != "float32" and not frozen:
            raise ValueError(
                f"model.dtype: {self.model.dtype} is for frozen weights, and this objective trains them; "
                "use float32 (model.autocast: bfloat16 makes it fast) or model.lora"
            )
        if self.model.lora is not None and self.optimizer.kind == "muon":
            raise ValueError(
                "optimizer.kind: muon orthogonalises the update of a whole matrix, and model.lora trains only "
                "factors of one; use adamw"
            )
        if self.features is not None and not is_frozen:
            raise ValueError(
                "features: what the model computes is kept only where the model stays as it is, and this objective "
                "trains it; leave the section out"
            )
        if self.features is not None and any(source.streaming for source in self.data.train):
            raise ValueError(
                "features: a source has streaming: true, and only rows on disk have features; set streaming: false"
            )
        context = (self.model.config or {}).get("max_position_embeddings")
        if isinstance(context, int) and self.batch.length > context:
            raise ValueError(
                f"batch.length: {self.batch.length} is more than model.config.max_position_embeddings: {context}"
            )
        return self

    @property
    def total_steps(self) -> int:
        """T. Only a recipe from `with_total_steps` knows it when `epochs` or `max_tokens` were given."""
        assert self.max_steps is not None
        return self.max_steps

    def with_total_steps(self, num_sequences: int) -> Self:
        """The recipe with max_steps in place of max_tokens or epochs, for a corpus of so many sequences.

        Raises UserError where the warm-up is longer than that.
        """
        steps = self._steps(num_sequences)
        try:
            self._check_warmup(steps)
        except ValueError as error:
            raise UserError(str(error)) from None
        return self.model_copy(update={"max_steps": steps, "max_tokens": None, "epochs": None})

    def _steps(self, num_sequences: int) -> int:
        if self.max_steps is not None:
            return self.max_steps
        if self.max_tokens is not None:
            return math.ceil(self.max_tokens / (self.batch.sequences * self.batch.length))
        assert self.epochs is not None
        return math.ceil(self.epochs * num_sequences / self.batch.sequences)

    def _check_warmup(self, steps: int) -> None:
        warmup = self.schedule.warmup_steps
        if warmup > steps:
            raise ValueError(f"schedule.warmup_steps: {warmup} is more than the {steps} steps of the run")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe[Any]:
    """Read a YAML recipe, with `${...}` interpolation, and apply `dotted.key=value` overrides.

    Raises UserError, one line, as `read_recipe_file` and `parse_recipe`.
    """
    return parse_recipe(read_recipe_file(path, overrides), origin=str(path))


def parse_recipe(values: dict[str, Any], origin: str = "recipe") -> Recipe[Any]:
    """Check a recipe given as nested dicts. Raises UserError naming the key, the value and the nearest valid one."""
    objective = values.get("objective")
    config_class: type[Section] = Section  # finds what is wrong beside an objective that is none
    if isinstance(objective, dict):
        kind = objective.get("kind")
        if not isinstance(kind, str) or kind not in OBJECTIVES:
            raise UserError(
                f"{origin}: objective.kind: {shorten(kind)} is not a method;{nearest(str(kind), OBJECTIVES)}"
            )
        config_class = OBJECTIVES[kind].config_class
    recipe_class: Any = Recipe.__class_getitem__(config_class)
    try:
        return recipe_class.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}: {describe(error, recipe_class)}") from None
