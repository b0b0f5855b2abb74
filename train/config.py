"""The recipe: one strict, typed YAML file a run. Every key is described here; docs/recipes.md is made from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from layerskip_model.errors import UserError
from train.data.sources import DataConfig
from train.data.tokenizer import TokenizerConfig
from train.objectives import OBJECTIVES
from train.recipe_errors import describe, nearest, shorten
from train.recipe_file import read_recipe_file
from train.section import FrozenModelSection, Section


class BatchConfig(Section):
    """The global batch, which the program splits over ranks and accumulation."""

    sequences: int = Field(ge=1, description="sequences an optimizer step, over all ranks")
    length: int = Field(ge=2, description="tokens a sequence")
    micro: int | None = Field(None, ge=1, description="sequences a forward on one rank; default: all at once")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.micro is not None and self.micro > self.sequences:
            raise ValueError(f"micro: {self.micro} is more than sequences: {self.sequences}")
        return self


class ModelConfig(Section):
    """The language model: a new one from a config, or one that exists."""

    config: dict[str, Any] | None = Field(
        None, description="a transformers config with model_type: random weights"
    )
    name_or_path: str | None = Field(None, description="hub name or directory of a checkpoint")
    tokenizer: TokenizerConfig | None = Field(None, description="default: that of name_or_path")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the loaded weights; bfloat16 where they are frozen, what trains is float32"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        None, description="default: transformers' choice"
    )
    autocast: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="matmuls in bfloat16; auto: where the hardware multiplies it faster"
    )
    activation_checkpointing: bool = Field(False, description="recompute layers in backward to save memory")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.config is None) == (self.name_or_path is None):
            raise ValueError("give exactly one of config (a new model) and name_or_path (an existing one)")
        return self

    @model_validator(mode="after")
    def _new_model_fits(self) -> Self:
        if self.config is None:
            return self
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, for example 'llama'")
        if self.tokenizer is None:
            raise ValueError(
                "a new model (config) needs tokenizer: {train: {vocab_size: N}} or {name_or_path: ...}"
            )
        if self.dtype != "float32":
            raise ValueError(f"dtype: {self.dtype} is for weights that are loaded; a new model is float32")
        vocab_size = self.config.get("vocab_size")
        if self.tokenizer.train and isinstance(vocab_size, int):
            wanted = self.tokenizer.train.vocab_size
            if vocab_size < wanted:
                raise ValueError(
                    f"config.vocab_size: {vocab_size} is less than tokenizer.train.vocab_size: {wanted}; "
                    "leave the first one out"
                )
        return self


Betas = Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)]


class AdamWConfig(Section):
    """torch's AdamW for every parameter; no weight decay on vectors."""

    kind: Literal["adamw"]
    lr: float = Field(gt=0.0, description="the full learning rate, which schedule multiplies")
    betas: Betas = Field([0.9, 0.95], description="decay of AdamW's two running averages")
    eps: float = Field(1e-8, gt=0.0, description="added to AdamW's denominator")
    weight_decay: float = Field(
        0.1, ge=0.0, description="decoupled, times the learning rate; of matrices only"
    )
    clip_norm: float | None = Field(1.0, gt=0.0, description="largest norm of the gradient; null: don't clip")


class MuonConfig(Section):
    """torch's Muon for the matrices of the decoder layers, AdamW for everything else."""

    kind: Literal["muon"]
    lr: float = Field(gt=0.0, description="of the matrices; schedule multiplies it")
    momentum: float = Field(0.95, ge=0.0, lt=1.0, description="of Muon, Nesterov's")
    adamw_lr: float = Field(gt=0.0, description="of embeddings, head and vectors; schedule multiplies it")
    betas: Betas = Field([0.9, 0.95], description="decay of AdamW's two running averages")
    eps: float = Field(1e-8, gt=0.0, description="added to AdamW's denominator")
    weight_decay: float = Field(
        0.1, ge=0.0, description="decoupled, times the learning rate; of matrices only"
    )
    clip_norm: float | None = Field(1.0, gt=0.0, description="largest norm of the gradient; null: don't clip")


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


class ScheduleConfig(Section):
    """The learning rate as a function of the optimizer step."""

    kind: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the rate falls after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="linear from 0 to the full rate")
    final_fraction: float = Field(
        0.0, ge=0.0, le=1.0, description="of the full rate, at the last step; not used by constant"
    )

    def factor(self, step: int, total_steps: int) -> float:
        """What the learning rate is multiplied with at a step of 0..total_steps - 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        done = (step - self.warmup_steps + 1) / max(total_steps - self.warmup_steps, 1)
        falling = 0.5 * (1.0 + math.cos(math.pi * done)) if self.kind == "cosine" else 1.0 - done
        return self.final_fraction + (1.0 - self.final_fraction) * falling


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
    wandb: WandbConfig | None = Field(None, description="default: not used")


class CheckpointConfig(Section):
    """Checkpoints to resume from; the newest complete one is used when the command is run again."""

    every: int | None = Field(
        None, ge=1, description="optimizer steps; default: only when interrupted and at the end"
    )
    keep: int = Field(2, ge=1, description="how many to keep")


class EvaluateConfig(Section):
    """Held-out evaluation, of every exit; one more follows the last step."""

    every: int | None = Field(None, ge=1, description="optimizer steps; default: only at the end")
    sequences: int | None = Field(None, ge=1, description="evaluate on that many; default: all")


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
        if self.epochs is None:
            self._check_warmup(self._steps(num_sequences=0))
        return self

    @model_validator(mode="after")
    def _model_fits(self) -> Self:
        if self.model.dtype != "float32" and not isinstance(self.objective, FrozenModelSection):
            raise ValueError(
                f"model.dtype: {self.model.dtype} is for frozen weights, and this objective trains them; "
                "use float32 (model.autocast: bfloat16 makes it fast)"
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
