"""Medusa heads on disk, as Medusa v0.1 has them (github.com/FasterDecoding/Medusa; TGI and TensorRT-LLM read it too).

`config.json` has medusa_num_heads, medusa_num_layers and base_model_name_or_path, and no `architectures`, by which TGI
tells heads from models. `medusa_lm_head.safetensors` has `{h}.{l}.linear.weight`, `{h}.{l}.linear.bias` of the residual
blocks and `{h}.{n}.weight` of the projection, n being the number of blocks. A projection that all heads share is there
once, as `projection.weight`, which that format does not know. Ours beside them: sizes and the base's fingerprint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats.fingerprint import checkpoint_directory, fingerprint
from layerskip_model.medusa import MedusaHeads

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "medusa_lm_head.safetensors"
SHARED = "projection.weight"


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
    tensors = {theirs: state[ours].to(dtype).contiguous() for ours, theirs in _names(heads).items()}
    vocab, hidden = tensors[_names(heads)["projections.0.weight"]].shape
    config = {
        "medusa_num_heads": heads.number,
        "medusa_num_layers": heads.layers,
        "base_model_name_or_path": base,
        "base_fingerprint": base_fingerprint,
        "hidden_size": hidden,
        "vocab_size": vocab,
        "shared_projection": heads.shared,
    }
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_medusa(directory: str | Path, backbone: Backbone) -> MedusaHeads:
    """The heads in a directory, in float32, for the model that they were trained on.

    Raises UserError for files that are missing or damaged and for heads of another model: of other sizes, another
    vocabulary, or other weights. A model on the meta device is compared by its sizes only, as is one without files.
    """
    config = read_config(directory)
    shared = bool(config.get("shared_projection", False))
    number, layers = config["medusa_num_heads"], config["medusa_num_layers"]
    heads = MedusaHeads(backbone, heads=number, layers=layers, shared=shared)
    names = _names(heads)
    state = _read_weights(Path(directory))
    if differing := sorted(state.keys() ^ set(names.values())):
        what = "lacks" if differing[0] not in state else "has beside them"
        raise UserError(
            f"heads '{directory}': {WEIGHTS_FILE} {what} '{differing[0]}', by {CONFIG_FILE} there are {number} heads "
            f"of {layers} blocks; export them again"
        )
    for name, parameter in heads.named_parameters():
        stored, ours = list(state[names[name]].shape), list(parameter.shape)
        if stored != ours:
            raise UserError(
                f"heads '{directory}' are of another model: {names[name]} is {stored}, and this one, of vocabulary "
                f"{backbone.vocab_size} and hidden size {backbone.hidden_size}, needs {ours}"
            )
    _require_base(directory, config, backbone)
    for name, parameter in heads.named_parameters():
        parameter.data.copy_(state[names[name]])
    return heads


def read_config(directory: str | Path) -> dict[str, Any]:
    """The config.json of heads. Raises UserError where there are none, or it is damaged."""
    path = Path(directory) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"heads '{directory}': no {CONFIG_FILE} in it; name a directory of Medusa heads"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"heads '{directory}': {CONFIG_FILE} is damaged ({error}); export them again"
        ) from None
    for key in ("medusa_num_heads", "medusa_num_layers"):
        value = config.get(key) if isinstance(config, dict) else None
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"heads '{directory}': {key} is {value!r} in {CONFIG_FILE}; these are no Medusa heads"
            )
    return config


def _read_weights(directory: Path) -> dict[str, Tensor]:
    try:
        return load_file(directory / WEIGHTS_FILE)
    except FileNotFoundError:
        raise UserError(f"heads '{directory}': there is no {WEIGHTS_FILE} in it; export them again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"heads '{directory}': {WEIGHTS_FILE} is cut short or damaged ({error})") from None


def _require_base(directory: str | Path, config: dict[str, Any], backbone: Backbone) -> None:
    """Refuse a model with other weights than the one the heads were trained on."""
    name, trained_on = backbone.model.name_or_path, config.get("base_fingerprint")
    if not name or trained_on is None or backbone.head.weight.is_meta:
        return
    if fingerprint(checkpoint_directory(name)) != trained_on:
        raise UserError(
            f"heads '{directory}' were trained on '{config.get('base_model_name_or_path')}' with other weights than "
            f"'{name}' has (its fingerprint differs); use that model, or train heads for this one"
        )


def _names(heads: MedusaHeads) -> dict[str, str]:
    """A parameter's name in `heads` -> its name in the file."""
    names = {
        f"blocks.{h}.{block}.linear.{part}": f"{h}.{block}.linear.{part}"
        for h in range(heads.number)
        for block in range(heads.layers)
        for part in ("weight", "bias")
    }
    if heads.shared:
        return names | {"projections.0.weight": SHARED}
    return names | {f"projections.{h}.weight": f"{h}.{heads.layers}.weight" for h in range(heads.number)}
