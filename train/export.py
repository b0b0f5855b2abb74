"""Writing a trained language model as a plain transformers checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from layerskip_model.formats.huggingface import no_progress_bar
from layerskip_model.lora import merged_state


def export_model(
    model: PreTrainedModel, state: dict[str, Tensor], directory: Path, dtype: torch.dtype
) -> None:
    """Write `state`, the model's whole state_dict, rounded to `dtype`, as AutoModelForCausalLM loads it.

    Adapters are merged in float32 first. Weights are read from `state` only: those of the module may be shards.
    """
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=dtype)
    plain.generation_config = model.generation_config
    tied = set(plain.all_tied_weights_keys)  # these get their values from others when it is loaded
    weights = {name: value for name, value in merged_state(model, state).items() if name not in tied}
    with no_progress_bar():
        plain.save_pretrained(directory, state_dict={n: _rounded(t, dtype) for n, t in weights.items()})


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
