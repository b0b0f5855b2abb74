"""Writing a trained language model as a plain transformers checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layerskip_model.formats.huggingface import no_progress_bar


def export_model(
    model: PreTrainedModel, state: dict[str, Tensor], directory: Path, dtype: torch.dtype
) -> None:
    """Write `state`, the model's whole state_dict, rounded to `dtype`, as AutoModelForCausalLM loads it."""
    rounded = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    with no_progress_bar():
        model.save_pretrained(directory, state_dict=rounded)
