"""Load models and tokenizers from a directory or the hub, with errors a user can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from layerskip_model.errors import UserError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(
    name_or_path: str,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode. `dtype` is a name in DTYPES.

    Raises UserError where there is no such model, naming the place and what is missing.
    """
    _require_checkpoint(name_or_path)
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=DTYPES[dtype], **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model '{name_or_path}' cannot be loaded: {first_line(error)}") from error
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval()


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. Raises UserError where there is none."""
    _require_checkpoint(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # the tokenizer backends raise whatever their parser raises
        raise UserError(
            f"model '{name_or_path}' has no tokenizer that can be loaded ({first_line(error)}); "
            "save one there with tokenizer.save_pretrained"
        ) from error


def new_model(config: dict[str, Any], *, attn_implementation: str | None = None) -> PreTrainedModel:
    """A model with random weights (drawn from torch's generator) in float32, from a config with `model_type`.

    Raises UserError for an unknown model type and for keys that this type does not have.
    """
    settings = dict(config)
    kind = settings.pop("model_type")
    try:
        known = AutoConfig.for_model(kind)
    except ValueError:
        raise UserError(
            f"model.config.model_type: '{kind}' is no model type of transformers; try 'llama'"
        ) from None
    unknown = sorted(set(settings) - set(known.to_dict()) - set(known.attribute_map))
    if unknown:
        raise UserError(
            f"model.config.{unknown[0]}: unknown key (value {settings[unknown[0]]!r}) for model type '{kind}'"
        )
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **settings), dtype=torch.float32, **options
        )
    except Exception as error:  # whatever the model's constructor makes of impossible sizes
        raise UserError(f"model.config: no '{kind}' model can be made of it: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _require_checkpoint(name_or_path: str) -> None:
    """A path that exists must be a checkpoint directory; anything else is taken for a hub name."""
    path = Path(name_or_path)
    if path.is_file():
        raise UserError(f"model '{name_or_path}' is a file; name the directory that holds config.json")
    if path.is_dir() and not (path / "config.json").is_file():
        inner = [child.name for child in sorted(path.iterdir()) if (child / "config.json").is_file()]
        fix = f"; did you mean '{path / inner[0]}'?" if inner else ""
        raise UserError(f"model '{name_or_path}' is not a checkpoint: it has no config.json{fix}")
    if not path.exists() and (name_or_path.count("/") != 1 or name_or_path.startswith((".", "/"))):
        raise UserError(
            f"model '{name_or_path}': no such directory, and not a hub name of the form owner/name"
        )
