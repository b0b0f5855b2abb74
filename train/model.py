"""The language model and the precision that a recipe asks for."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import load_model, new_model
from train.config import ModelConfig
from train.data.tokenizer import TokenizerConfig


def tokenizer_config(config: ModelConfig) -> TokenizerConfig:
    """The recipe's tokenizer; without one, that of the model it starts from."""
    return config.tokenizer or TokenizerConfig(name_or_path=config.name_or_path)


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
            config.name_or_path, dtype=config.dtype, attn_implementation=config.attn_implementation
        )
    text_config = model.config.get_text_config()
    if text_config.vocab_size < len(tokenizer):
        raise UserError(
            f"model: vocab_size {text_config.vocab_size} is smaller than the tokenizer's {len(tokenizer)} tokens; "
            "raise model.config.vocab_size or leave it out"
        )
    if length > text_config.max_position_embeddings:
        raise UserError(
            f"batch.length: {length} is more than the model's context of {text_config.max_position_embeddings}; "
            "shorten it or raise max_position_embeddings"
        )
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def mixed_precision(config: ModelConfig) -> str:
    """'bf16' or 'no', as accelerate calls them. With 'auto', bf16 where the hardware has it as its own."""
    if config.autocast != "auto":
        return "bf16" if config.autocast == "bfloat16" else "no"
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, probe, lambda: False)() for probe in probes) else "no"
