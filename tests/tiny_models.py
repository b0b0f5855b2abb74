"""Tiny random transformers models for tests: 4 layers x 32, float64 so that ties do not happen."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.olmo2 import Olmo2Config
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen3 import Qwen3Config

CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 5}),
    "qwen3": (Qwen3Config, {}),
    "gemma2": (
        Gemma2Config,
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 5, "sliding_window_pattern": 2}),
    "olmo2": (Olmo2Config, {}),
    "phi3": (Phi3Config, {}),
}


def tiny_model(
    kind: str = "llama", *, attention: str | None = None, dtype: torch.dtype = torch.float64, **changes: Any
) -> PreTrainedModel:
    """A random model whose logits are far from uniform. `changes` go to its configuration."""
    config_type, extra = CONFIGS[kind]
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    config = config_type(**{**sizes, **extra, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    return model.eval()


def agreeing_model(
    kind: str = "llama", *, layers: int = 1, scale: float = 0.05, **changes: Any
) -> PreTrainedModel:
    """A model whose layers after the first `layers` change little, so that early exits mostly agree."""
    model = tiny_model(kind, **changes)
    for layer in list(model.get_decoder().layers)[layers:]:
        layer.self_attn.o_proj.weight.data *= scale
        layer.mlp.down_proj.weight.data *= scale
    return model
