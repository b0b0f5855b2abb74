"""Released heads, bound to their model and written as training writes them. No number changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from layerskip_model.errors import UserError
from layerskip_model.formats import heads as files
from layerskip_model.formats import hydra, medusa
from layerskip_model.formats.fingerprint import checkpoint_directory, fingerprint
from layerskip_model.formats.heads import HeadsWritten
from layerskip_model.formats.huggingface import load_config, outline
from layerskip_model.formats.record import carry_record


class Format(NamedTuple):
    """How heads of a kind are read, tried on a model and written."""

    kind: str
    stem: str
    read: Callable[[Path], Any]
    build: Callable[..., Any]
    write: Callable[..., None]


def import_heads(name: str, model: str, directory: Path) -> HeadsWritten:
    """Write released Medusa or Hydra heads into an empty directory, in our form, for the model they were trained on.

    Medusa's projections become one that the heads share if all are the same. Raises UserError for heads that cannot
    be read, and for those of another model: by its sizes, and by its fingerprint where they tell one.
    """
    place = files.heads_directory(name)
    of = HYDRA if _is_hydra(place) else MEDUSA
    heads = of.read(place)
    of.build(heads, outline(model, load_config(model)), name)
    weights = fingerprint(checkpoint_directory(model))
    if heads.config.get("base_fingerprint", weights) != weights:
        raise UserError(files.other_weights(name, heads.config, model))
    of.write(directory, heads, base=model, base_fingerprint=weights)
    size = (directory / f"{of.stem}.safetensors").stat().st_size
    dtype = next(iter(heads.tensors.values())).dtype
    carry_record(place, directory, dtype)
    return HeadsWritten(of.kind, heads.number, heads.layers, dtype, model, size, int(heads.shared))


def _is_hydra(directory: Path) -> bool:
    config = files.read_config(directory, "Medusa or Hydra", ())
    return hydra.COUNTS[0] in config


def _medusa(directory: Path) -> medusa.StoredMedusa:
    """The heads in a directory, with one projection if all that they have are equal."""
    heads = medusa.read_medusa(directory)
    names = [f"{h}.{heads.layers}.weight" for h in range(heads.number)]
    if heads.shared or heads.number == 1:
        return heads
    first = heads.projection(0)
    if not all(torch.equal(heads.tensors[name], first) for name in names[1:]):
        return heads
    own = {key: value for key, value in heads.tensors.items() if key not in names}
    return replace(heads, shared=True, tensors=own | {medusa.SHARED: first})


MEDUSA = Format("Medusa", medusa.STEM, _medusa, medusa.build, medusa.write_stored)
HYDRA = Format("Hydra", hydra.STEM, hydra.read_hydra, hydra.build, hydra.write_stored)
