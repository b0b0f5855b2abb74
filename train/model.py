"""The language model and the precision that a recipe asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import DTYPES, load_model, new_model, one_line
from layerskip_model.lora import add_lora
from train.data.tokenizer import TokenizerConfig
from train.model_config import ModelConfig
from train.recipe_errors import guess, shorten


def tokenizer_config(config: ModelConfig) -> TokenizerConfig:
    """The recipe's tokenizer; without one, that of the model it starts from."""
    return config.tokenizer or TokenizerConfig(name_or_path=config.name_or_path)


def outline_model(config: ModelConfig) -> PreTrainedModel:
    """The model without any weights, on the meta device: quick, and refuses most of what `build_model` would.

    Raises UserError for a model type, a configuration key or a checkpoint that there is not.
    """
    options: dict[str, Any] = {}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    settings = _new_settings(config.config) if config.config is not None else _stored_settings(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, dtype=DTYPES[config.dtype], **options)
    except Exception as error:  # whatever the model's constructor makes of impossible sizes
        raise UserError(f"model: cannot be made of its configuration ({one_line(error)})") from error
    if config.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"model.activation_checkpointing: '{model.config.model_type}' models cannot do it; leave it out"
        )
    if config.lora is not None:
        add_lora(model, **config.lora.model_dump())
    return model


def _new_settings(given: dict[str, Any]) -> PreTrainedConfig:
    kind = given["model_type"]
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"model.config.model_type: '{kind}' is no model type of transformers;{guess(kind, CONFIG_MAPPING)}"
        )
    known = AutoConfig.for_model(kind)
    names = sorted({*known.to_dict(), *known.attribute_map})
    for key in given:
        if key not in names:
            raise UserError(
                f"model.config.{key}: unknown key (value {shorten(given[key])}) for model_type '{kind}';"
                f"{guess(key, names)}"
            )
    special = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])  # the tokenizer's
    try:
        return AutoConfig.for_model(kind, **special | {k: v for k, v in given.items() if k != "model_type"})
    except Exception as error:  # whatever the configuration's class checks
        raise UserError(f"model.config: {one_line(error)}") from error


def _stored_settings(config: ModelConfig) -> PreTrainedConfig:
    assert config.name_or_path is not None
    path = Path(config.name_or_path)
    is_path = path.exists() or path.is_absolute() or config.name_or_path.count("/") > 1
    if is_path and not (path / "config.json").is_file():
        what = "is no checkpoint: there is no config.json in it" if path.exists() else "is not there"
        raise UserError(
            f"model.name_or_path: '{path}' {what}; name a checkpoint's directory, or train it first"
        )
    try:
        return AutoConfig.from_pretrained(config.name_or_path)
    except Exception as error:  # a damaged file can fail in any reader
        raise UserError(f"model.name_or_path: '{path}' cannot be loaded ({one_line(error)})") from error


def build_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> PreTrainedModel:
    """The model, new or loaded, in training mode. The same weights on every rank.

    A new one gets the tokenizer's vocabulary size and special tokens. Raises UserError where the model, the
    tokenizer and sequences of `length` tokens don't go together.
    """
    if config.config is not None:
        torch.manual_seed(seed)
        settings = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        } | config.config
        model = new_model(settings, attn_implementation=config.attn_implementation)
    else:
        assert config.name_or_path is not None
        model = load_model(
            config.name_or_path,
            dtype=config.dtype,
            # what bitsandbytes has quantized stays where it was loaded
            device_map=PartialState().device if config.quantization else None,
            quantization=config.quantization,
            attn_implementation=config.attn_implementation,
        )
    check_fits(config, model, len(tokenizer), length)
    if config.lora is not None:
        torch.manual_seed(seed)
        add_lora(model, **config.lora.model_dump())
    if config.activation_checkpointing:
        enable_checkpointing(model)
    return model.train()


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward instead of keeping what its backward needs."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def check_fits(config: ModelConfig, model: PreTrainedModel, vocab_size: int, length: int) -> None:
    """Raise UserError unless the model takes a tokenizer of `vocab_size` tokens and sequences of `length`."""
    sizes = model.config.get_text_config()
    is_given = config.config is None or "vocab_size" in config.config  # else it becomes the tokenizer's
    if is_given and sizes.vocab_size < vocab_size:
        raise UserError(
            f"model.config.vocab_size: {sizes.vocab_size} is less than the tokenizer's {vocab_size} tokens; "
            f"{'leave it out' if config.config else 'use the tokenizer of the model'}"
        )
    context = getattr(sizes, "max_position_embeddings", None)  # some have no limit
    if context is not None and length > context:
        raise UserError(
            f"batch.length: {length} is more than the model's context of {context} tokens; "
            "shorten it or raise max_position_embeddings"
        )


def mixed_precision(config: ModelConfig) -> str:
    """'bf16' or 'no', as accelerate calls them. With 'auto', bf16 where the hardware has it as its own."""
    if config.autocast != "auto":
        return "bf16" if config.autocast == "bfloat16" else "no"
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, probe, lambda: False)() for probe in probes) else "no"


def export_dtype(config: ModelConfig) -> torch.dtype:
    """What exported weights are rounded to; by default what the checkpoint stores that the run began from."""
    if config.export_dtype != "auto":
        return DTYPES[config.export_dtype]
    stored = _stored_settings(config).get_text_config().dtype if config.name_or_path else None
    return stored if isinstance(stored, torch.dtype) else DTYPES.get(str(stored), torch.float32)
