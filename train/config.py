"""The recipe: one strict, typed YAML file a run. Every key is described here; docs/recipes.md is made from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, SerializeAsAny, ValidationError, model_validator
from yaml import YAMLError

from layerskip_model.errors import UserError
from train.data.sources import DataConfig
from train.data.tokenizer import TokenizerConfig
from train.objectives import OBJECTIVES
from train.recipe_errors import describe, nearest
from train.section import Section


class BatchConfig(Section):
    """The global batch, which the program splits over ranks and accumulation."""

    sequences: int = Field(ge=1, description="sequences an optimizer step, over all ranks")
    length: int = Field(ge=2, description="tokens a sequence")
    micro: int | None = Field(None, ge=1, description="sequences a forward on one rank; default: all at once")


class ModelConfig(Section):
    """The language model: a new one from a config, or one that exists."""

    config: dict[str, Any] | None = Field(
        None, description="a transformers config with model_type: random weights"
    )
    name_or_path: str | None = Field(None, description="hub name or directory of a checkpoint")
    tokenizer: TokenizerConfig | None = Field(None, description="default: the one of name_or_path")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the loaded weights")
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
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example 'llama'")
        if self.config is not None and self.tokenizer is None:
            raise ValueError(
                "a new model (config) needs tokenizer: {train: {vocab_size: N}} or {name_or_path: ...}"
            )
        return self


class AdamWConfig(Section):
    """torch's AdamW for every parameter; no weight decay on vectors."""

    kind: Literal["adamw"]
    lr: float = Field(gt=0.0)
    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.1, ge=0.0)
    clip_norm: float | None = Field(1.0, gt=0.0, description="largest norm of the gradient; null: don't clip")


class MuonConfig(Section):
    """torch's Muon for the matrices of the decoder layers, AdamW for everything else."""

    kind: Literal["muon"]
    lr: float = Field(gt=0.0, description="of the matrices")
    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    adamw_lr: float = Field(gt=0.0, description="of embeddings, head and vectors")
    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.1, ge=0.0)
    clip_norm: float | None = Field(1.0, gt=0.0, description="largest norm of the gradient; null: don't clip")


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


class ScheduleConfig(Section):
    """The learning rate as a function of the optimizer step."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="linear from 0 to the full rate")
    final_fraction: float = Field(0.0, ge=0.0, le=1.0, description="of the full rate, at the last step")

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

    project: str
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class LogConfig(Section):
    """Where metrics go besides the terminal and OUTPUT_DIR/log.jsonl."""

    every: int = Field(10, ge=1, description="optimizer steps")
    wandb: WandbConfig | None = None


class CheckpointConfig(Section):
    """Checkpoints to resume from; the newest complete one is used when the command is run again."""

    every: int | None = Field(None, ge=1, description="optimizer steps; default: only when interrupted")
    keep: int = Field(2, ge=1, description="how many to keep")


class EvaluateConfig(Section):
    """Held-out evaluation, of every exit; one more follows the last step."""

    every: int | None = Field(None, ge=1, description="optimizer steps; default: only at the end")
    sequences: int | None = Field(None, ge=1, description="evaluate on that many; default: all")


O = TypeVar("O", bound=Section)  # noqa: E741


class Recipe(Section, Generic[O]):
    """One run. `objective` belongs to the method; everything else reads alike in every recipe."""

    output_dir: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; or max_tokens, or epochs")
    max_tokens: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0.0)
    batch: BatchConfig
    model: ModelConfig
    data: DataConfig
    objective: SerializeAsAny[O]
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        lengths = {name: getattr(self, name) for name in ("max_steps", "max_tokens", "epochs")}
        given = [f"{name}: {value}" for name, value in lengths.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of max_steps, max_tokens and epochs, not {', '.join(given) or 'none'}"
            )
        return self

    @property
    def total_steps(self) -> int:
        """T. Only a recipe from `with_total_steps` knows it when `epochs` or `max_tokens` were given."""
        assert self.max_steps is not None
        return self.max_steps

    def with_total_steps(self, num_sequences: int) -> Self:
        """The recipe with max_steps in place of max_tokens or epochs, for a corpus of so many sequences."""
        if self.max_steps is not None:
            steps = self.max_steps
        elif self.max_tokens is not None:
            steps = math.ceil(self.max_tokens / (self.batch.sequences * self.batch.length))
        else:
            assert self.epochs is not None
            steps = math.ceil(self.epochs * num_sequences / self.batch.sequences)
        if self.schedule.warmup_steps > steps:
            raise UserError(
                f"schedule.warmup_steps: {self.schedule.warmup_steps} is more than the {steps} steps of the run"
            )
        return self.model_copy(update={"max_steps": steps, "max_tokens": None, "epochs": None})


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe[Any]:
    """Read a YAML recipe, with `${...}` interpolation, and apply `dotted.key=value` overrides.

    Raises UserError, one line, for a file that is missing or no YAML and for everything `parse_recipe` refuses.
    """
    for override in overrides or []:
        if "=" not in override or override.startswith("="):
            raise UserError(f"override '{override}': write it as key=value, for example optimizer.lr=0.01")
    try:
        loaded = OmegaConf.load(path)
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides or []))
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise UserError(f"recipe {path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"recipe {path}: is a directory; name a YAML file in it") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: holds no mapping of keys to values")
    return parse_recipe({str(key): value for key, value in values.items()}, origin=str(path))


def parse_recipe(values: dict[str, Any], origin: str = "recipe") -> Recipe[Any]:
    """Check a recipe given as nested dicts. Raises UserError naming the key, the value and the nearest valid one."""
    objective = values.get("objective")
    kind = objective.get("kind") if isinstance(objective, dict) else None
    if kind not in OBJECTIVES:
        raise UserError(
            f"{origin}: objective.kind: {kind!r} is not a method;{nearest(str(kind), list(OBJECTIVES))}"
        )
    recipe_class: Any = Recipe.__class_getitem__(OBJECTIVES[kind].config_class)
    try:
        return recipe_class.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}: {describe(error, recipe_class)}") from None
