"""Hydra heads on disk, as released (github.com/zankner/Hydra).

`config.json` has hydra_num_heads, hydra_num_layers, hydra_head_arch (`mlp`, or `prefix-mlp` for Hydra++),
grounded_heads and base_model_name_or_path. `hydra_lm_head.safetensors` (or `.pt`) has `hydra_mlp.{i}.{j}.linear.*` of
head i's block j, `hydra_mlp.{i}.{j}.res_connection.*` of the first, `hydra_lm_head.{i}.*` of the projection, and of
Hydra++ `prefix_embeding_layer.layers.0.*` and `prefix_embeding_layer.norm.*`. There dropout is a module, too: block j
is number 2j + 1, and the projection `hydra_lm_head.{i}.1.*`. A projection that all heads share is there once, as
`projection.*`, which that format does not know. Ours beside them in config.json: sizes and the base's fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats import heads as files
from layerskip_model.hydra import HydraHeads

STEM = "hydra_lm_head"
COUNTS = ("hydra_num_heads", "hydra_num_layers")
ARCHITECTURES = {"mlp": False, "prefix-mlp": True}  # hydra_head_arch -> whether there is prefix attention
PREFIX = "prefix_embeding_layer"  # spelled as there
# Copies of the model's own, which released files have too.
NOT_READ = ("input_embed_fn.weight", f"{PREFIX}.embed_tokens.weight")


@dataclass(frozen=True)
class StoredHydra:
    """Hydra heads as files have them.

    Attributes:
        number, layers, has_prefix, shared: K, n, whether there is prefix attention, and one projection for all.
        config: all of config.json.
        tensors: by their names in the file, in their own dtypes.
    """

    number: int
    layers: int
    has_prefix: bool
    shared: bool
    config: dict[str, Any] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def sizes(self) -> tuple[int, int]:
        """Vocabulary and hidden size."""
        vocab, hidden = self.tensors[self.names(["projections.0.weight"])["projections.0.weight"]].shape
        return vocab, hidden

    def names(self, ours: Iterable[str]) -> dict[str, str]:
        """A parameter's name in `HydraHeads` -> its name in the file."""
        return {name: self._name(name) for name in ours}

    def _name(self, ours: str) -> str:
        part, *rest = ours.split(".")
        if part == "prefix":  # prefix.layer.*
            return ".".join((PREFIX, "layers.0", *rest[1:]))
        if part == "prefix_norm":
            return ".".join((PREFIX, "norm", *rest))
        if part == "blocks":
            head, block, *rest = rest
            place = 2 * int(block) + 1 if self.has_prefix else block
            return ".".join(("hydra_mlp", head, str(place), *rest))
        head, *rest = rest
        if self.shared:
            return ".".join(("projection", *rest))
        return ".".join(("hydra_lm_head", head, *(["1"] if self.has_prefix else []), *rest))


def write_hydra(
    directory: Path,
    heads: HydraHeads,
    state: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    base: str,
    base_fingerprint: str,
) -> None:
    """Write heads for the model that is named `base` into a directory that is there.

    `state` is their state_dict with all values, as an engine gathered it; rounded to `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    stored = StoredHydra(heads.number, heads.layers, heads.prefix is not None, heads.shared, {}, tensors)
    names = stored.names(name for name, _ in heads.named_parameters())
    tensors.update({theirs: state[ours].to(dtype).contiguous() for ours, theirs in names.items()})
    write_stored(directory, stored, base=base, base_fingerprint=base_fingerprint)


def write_stored(directory: Path, heads: StoredHydra, *, base: str, base_fingerprint: str) -> None:
    """Write heads as they are, for the model that is named `base`, into a directory that is there."""
    vocab, hidden = heads.sizes
    config = {
        "hydra_num_heads": heads.number,
        "hydra_num_layers": heads.layers,
        "hydra_head_arch": next(arch for arch, has in ARCHITECTURES.items() if has == heads.has_prefix),
        "grounded_heads": True,
        "hidden_state_offset": 0,
        "base_model_name_or_path": base,
        "base_fingerprint": base_fingerprint,
        "hidden_size": hidden,
        "vocab_size": vocab,
        "shared_projection": heads.shared,
    }
    files.write_heads(directory, STEM, heads.tensors, config)


def load_hydra(directory: str | Path, backbone: Backbone) -> HydraHeads:
    """The heads in a directory, in float32, for the model that they were trained on.

    Raises UserError for files that are missing or damaged and for heads of another model: of other sizes, another
    vocabulary, or other weights. A model on the meta device is compared by its sizes only, as is one without files,
    and any with heads that were trained elsewhere and tell nothing of their model's weights.
    """
    stored = read_hydra(directory)
    heads = build(stored, backbone, directory)
    files.require_base(directory, stored.config, backbone)
    return heads


def build(stored: StoredHydra, backbone: Backbone, directory: str | Path) -> HydraHeads:
    """Heads for a model from those of a directory. Raises UserError for other sizes or another vocabulary."""
    heads = HydraHeads(
        backbone,
        heads=stored.number,
        layers=stored.layers,
        prefix_attention=stored.has_prefix,
        shared=stored.shared,
    )
    names = stored.names(name for name, _ in heads.named_parameters())
    files.require_names(directory, stored.tensors, names.values(), _told(stored))
    files.fill(heads, names, stored.tensors, directory, backbone)
    return heads


def read_hydra(directory: str | Path) -> StoredHydra:
    """The heads in a directory as they are, ours or those of others. Raises UserError, see `load_hydra`."""
    config = read_config(directory)
    number, layers = (config[key] for key in COUNTS)
    has_prefix = ARCHITECTURES[config["hydra_head_arch"]]
    shared = bool(config.get("shared_projection", False)) and number > 1
    tensors = {
        name: tensor
        for name, tensor in files.read_weights(directory, STEM).items()
        if name not in NOT_READ and not name.endswith("rotary_emb.inv_freq")
    }
    stored = StoredHydra(number, layers, has_prefix, shared, config, tensors)
    # A model's own kind of layer decides on the names in the prefix.
    of_heads = [name for name in tensors if not (has_prefix and name.startswith(f"{PREFIX}."))]
    wanted = stored.names(_of_heads(number, layers, shared)).values()
    files.require_names(directory, of_heads, wanted, _told(stored))
    return stored


def read_config(directory: str | Path) -> dict[str, Any]:
    """The config.json of Hydra heads. Raises UserError where there are none, it is damaged, or of an unknown kind."""
    config = files.read_config(directory, "Hydra", COUNTS)
    arch = config.get("hydra_head_arch", "mlp")
    if arch not in ARCHITECTURES:
        raise UserError(
            f"heads '{directory}': hydra_head_arch is {arch!r} in config.json; only {' and '.join(ARCHITECTURES)} "
            "can be read"
        )
    if not config.get("grounded_heads", False):
        raise UserError(
            f"heads '{directory}': grounded_heads is not true in config.json: they read no drafted tokens, so they "
            "are no Hydra heads; use Medusa heads"
        )
    if config.get("hidden_state_offset", 0) != 0:
        raise UserError(
            f"heads '{directory}': hidden_state_offset is {config['hidden_state_offset']} in config.json; only heads "
            "that read the last hidden state (0) can be read"
        )
    return config | {"hydra_head_arch": arch}


def _of_heads(number: int, layers: int, shared: bool) -> list[str]:
    """The names of parameters in `HydraHeads` that are no prefix's."""
    maps = [f"blocks.{head}.{block}.linear" for head in range(number) for block in range(layers)]
    maps += [f"blocks.{head}.0.res_connection" for head in range(number)]
    maps += [f"projections.{head}" for head in range(1 if shared else number)]
    return [f"{name}.{part}" for name in maps for part in ("weight", "bias")]


def _told(heads: StoredHydra) -> str:
    return (
        f"{heads.number} heads of {heads.layers} blocks{' and prefix attention' if heads.has_prefix else ''}"
    )
