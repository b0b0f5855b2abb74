"""The recipe's `model:` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from train.data.tokenizer import TokenizerConfig
from train.section import Section


class LoraConfig(Section):
    """Train low-rank adapters of the layers' matrices instead of the weights (pip install peft); merged on export."""

    rank: int = Field(16, ge=1, description="columns of B and rows of A in W + alpha / rank * B A")
    alpha: float = Field(32.0, gt=0.0, description="alpha / rank scales the adapters")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="of the adapters' inputs")
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="every matrix of the decoder layers, or names such as q_proj"
    )


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
    quantization: Literal["4bit", "8bit"] | None = Field(
        None,
        description="of the layers' frozen matrices, by bitsandbytes on a CUDA GPU; they compute in dtype",
    )
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of the exported weights; auto: as the checkpoint stores them, float32 for a new model",
    )
    lora: LoraConfig | None = Field(None, description="default: every weight trains that the method trains")
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
        if self.quantization is not None:
            raise ValueError(
                f"quantization: {self.quantization} is for weights that are loaded, not new ones"
            )
        vocab_size = self.config.get("vocab_size")
        if self.tokenizer.train and isinstance(vocab_size, int):
            wanted = self.tokenizer.train.vocab_size
            if vocab_size < wanted:
                raise ValueError(
                    f"config.vocab_size: {vocab_size} is less than tokenizer.train.vocab_size: {wanted}; "
                    "leave the first one out"
                )
        return self
