"""Single tensors of a model's checkpoint, read without the model."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerskip_model.errors import UserError
from layerskip_model.formats.fingerprint import WEIGHTS, checkpoint_directory
from layerskip_model.formats.huggingface import one_line

EMBEDDING = ".embed_tokens.weight"
LM_HEAD = "lm_head.weight"


def base_embedding(model: str) -> Tensor:
    """A model's input embedding [vocab, hidden] as it is stored. Raises UserError where it cannot be found."""
    return _stored(model, EMBEDDING)


def base_lm_head(model: str) -> Tensor:
    """Its LM head [vocab, hidden] as it is stored, the embedding where they are one."""
    try:
        return _stored(model, LM_HEAD)
    except UserError:
        return _stored(model, EMBEDDING)


def _stored(model: str, ending: str) -> Tensor:
    """The first tensor whose name ends so."""
    place = checkpoint_directory(model)
    files = next((found for pattern in WEIGHTS if (found := sorted(place.glob(pattern)))), [])
    for path in files:
        try:
            tensor = _in_file(path, ending)
        except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"model '{model}': {path.name} is cut short or damaged ({one_line(error):.160}); get it again"
            ) from None
        if tensor is not None:
            return tensor
    raise UserError(
        f"model '{model}': there is no tensor '*{ending}' in its files, which this head needs; check them"
    )


def _in_file(path: Path, ending: str) -> Tensor | None:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            name = next((name for name in file.keys() if name.endswith(ending)), None)  # noqa: SIM118
            return None if name is None else file.get_tensor(name)
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return next((tensor for name, tensor in tensors.items() if name.endswith(ending)), None)
