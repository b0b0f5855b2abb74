"""Medusa heads on disk, as Medusa v0.1 has them (github.com/FasterDecoding/Medusa; TGI and TensorRT-LLM read it too).

`config.json` has medusa_num_heads, medusa_num_layers and base_model_name_or_path, and no `architectures`, by which TGI
tells heads from models. `medusa_lm_head.safetensors` (or `.pt`) has `{h}.{l}.linear.weight`, `{h}.{l}.linear.bias` of
the residual blocks and `{h}.{n}.weight` of the projection, n being the number of blocks. A projection that all heads
share is there once, as `projection.weight`, which that format does not know. Ours beside them in config.json: sizes and
the base's fingerprint.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats import heads as files
from layerskip_model.medusa import MedusaHeads

STEM = "medusa_lm_head"
COUNTS = ("medusa_num_heads", "medusa_num_layers")
SHARED = "projection.weight"


@dataclass(frozen=True)
class StoredMedusa:
    """Medusa heads as files have them.

    Attributes:
        number, layers, shared: K, n, and whether all heads have one projection.
        config: all of config.json.
        tensors: by their names in the file, in their own dtypes: what `tensor_names` says, nothing else.
    """

    number: int
    layers: int
    shared: bool
    config: dict[str, Any] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def sizes(self) -> tuple[int, int]:
        """Vocabulary and hidden size."""
        vocab, hidden = self.projection(0).shape
        return vocab, hidden

    def projection(self, head: int) -> Tensor:
        """Of that head: [vocab, hidden]."""
        return self.tensors[SHARED if self.shared else f"{head}.{self.layers}.weight"]


def write_medusa(
    directory: Path,
    heads: MedusaHeads,
    state: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    base: str,
    base_fingerprint: str,
) -> None:
    """Write heads for the model that is named `base` into a directory that is there.

    `state` is their state_dict with all values, as an engine gathered it; rounded to `dtype`.
    """
    names = tensor_names(heads.number, heads.layers, heads.shared)
    tensors = {theirs: state[ours].to(dtype).contiguous() for ours, theirs in names.items()}
    stored = StoredMedusa(heads.number, heads.layers, heads.shared, {}, tensors)
    write_stored(directory, stored, base=base, base_fingerprint=base_fingerprint)


def write_stored(directory: Path, heads: StoredMedusa, *, base: str, base_fingerprint: str) -> None:
    """Write heads as they are, for the model that is named `base`, into a directory that is there."""
    vocab, hidden = heads.sizes
    config = {
        "medusa_num_heads": heads.number,
        "medusa_num_layers": heads.layers,
        "base_model_name_or_path": base,
        "base_fingerprint": base_fingerprint,
        "hidden_size": hidden,
        "vocab_size": vocab,
        "shared_projection": heads.shared,
    }
    files.write_heads(directory, STEM, heads.tensors, config)


def load_medusa(directory: str | Path, backbone: Backbone) -> MedusaHeads:
    """The heads in a directory, in float32, for the model that they were trained on.

    Raises UserError for files that are missing or damaged and for heads of another model: of other sizes, another
    vocabulary, or other weights. A model on the meta device is compared by its sizes only, as is one without files,
    and any with heads that were trained elsewhere and tell nothing of their model's weights.
    """
    stored = read_medusa(directory)
    heads = build(stored, backbone, directory)
    files.require_base(directory, stored.config, backbone)
    return heads


def build(stored: StoredMedusa, backbone: Backbone, directory: str | Path) -> MedusaHeads:
    """Heads for a model from those of a directory. Raises UserError for other sizes or another vocabulary."""
    heads = MedusaHeads(backbone, heads=stored.number, layers=stored.layers, shared=stored.shared)
    names = tensor_names(stored.number, stored.layers, stored.shared)
    files.fill(heads, names, stored.tensors, directory, backbone)
    return heads


def read_medusa(directory: str | Path) -> StoredMedusa:
    """The heads in a directory as they are, ours or those of others. Raises UserError, see `load_medusa`."""
    config = read_config(directory)
    number, layers = (config[key] for key in COUNTS)
    shared = bool(config.get("shared_projection", False)) and number > 1
    tensors = files.read_weights(directory, STEM)
    in_file = _heads_in(tensors)
    if "shared_projection" not in config and in_file > number:
        # Released configurations say too little: that of medusa-vicuna-7b-v1.3 says 2 heads and its file has 5.
        print(
            f"heads '{directory}': config.json says {number} heads and the file has {in_file}: {in_file} are used",
            file=sys.stderr,
        )
        number = in_file
    names = tensor_names(number, layers, shared)
    projections = {theirs for ours, theirs in names.items() if ours.startswith("projections")}
    if not projections & tensors.keys() and "0.0.linear.weight" in tensors:
        raise UserError(
            f"heads '{directory}': no head has a projection after its {layers} blocks; heads that use the model's own "
            "LM head cannot be read"
        )
    files.require_names(directory, tensors, names.values(), f"{number} heads of {layers} blocks")
    return StoredMedusa(number, layers, shared, config, tensors)


def read_config(directory: str | Path) -> dict[str, Any]:
    """The config.json of Medusa heads. Raises UserError where there are none, or it is damaged."""
    return files.read_config(directory, "Medusa", COUNTS)


def tensor_names(number: int, layers: int, shared: bool) -> dict[str, str]:
    """A parameter's name in `MedusaHeads` -> its name in the file."""
    names = {
        f"blocks.{h}.{block}.linear.{part}": f"{h}.{block}.linear.{part}"
        for h in range(number)
        for block in range(layers)
        for part in ("weight", "bias")
    }
    if shared:
        return names | {"projections.0.weight": SHARED}
    return names | {f"projections.{h}.weight": f"{h}.{layers}.weight" for h in range(number)}


def _heads_in(tensors: dict[str, Tensor]) -> int:
    """One more than the highest number that a name begins with."""
    numbers = [int(found[0]) for name in tensors if (found := re.match(r"\d+", name))]
    return max(numbers, default=-1) + 1
