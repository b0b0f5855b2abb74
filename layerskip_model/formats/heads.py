"""What the formats of drafting heads share: where heads lie, config.json, the file of tensors, their model."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats.fingerprint import checkpoint_directory, fingerprint
from layerskip_model.formats.hub import hub_files, is_hub_name
from layerskip_model.formats.run import RUN_FILE, heads_of, model_of, read_run

CONFIG_FILE = "config.json"
SUFFIXES = (".safetensors", ".pt", ".bin")
FROM_HUB = (CONFIG_FILE, "tree.json", "recorded.json", *(f"*_lm_head{suffix}" for suffix in SUFFIXES))
LAYER_FILES = (
    "model*.safetensors",
    "pytorch_model*.bin",
)  # of a head that is a decoder layer; the first that match


class HeadsSource(NamedTuple):
    """Where heads lie, and the model that they are for as a run names it."""

    directory: Path
    model: Path | None


class HeadsWritten(NamedTuple):
    """What was written.

    Attributes:
        kind: Medusa or Hydra.
        base: the model that the heads are for, as its user loads it.
        bytes: of the file of weights.
        repeated: how often a projection that all heads share is in it; 0 where they share none.
    """

    kind: str
    heads: int
    layers: int
    dtype: torch.dtype
    base: str
    bytes: int
    repeated: int


def heads_directory(name: str) -> Path:
    """Where heads lie: the directory of that name, what the run there exported, or the files of a hub name.

    A directory may hold anything, and need not be there: who reads it says what is missing. Raises UserError for a
    run that trained no heads, and where the hub does not give them.
    """
    return source_of(name).directory


def source_of(name: str) -> HeadsSource:
    """The same with the model to decode with, where a run tells it. Raises UserError as `heads_directory`."""
    place = Path(name)
    if (place / RUN_FILE).is_file():
        content = read_run(place)
        directory = heads_of(place, content)
        if directory is None:
            raise UserError(f"heads '{name}': that run trained no heads; name one that did")
        return HeadsSource(directory, model_of(place, content))
    if place.exists() or not is_hub_name(name):
        return HeadsSource(place, None)
    directory = hub_files(f"heads '{name}'", name, FROM_HUB)
    if _may_be_a_layer(directory):  # whole models stay where they are
        directory = hub_files(f"heads '{name}'", name, FROM_HUB + LAYER_FILES)
    return HeadsSource(directory, None)


def read_config(directory: str | Path, what: str, counts: Sequence[str]) -> dict[str, Any]:
    """The config.json of heads. `what` they are called; `counts`, keys whose values are whole numbers from 1 on.

    Raises UserError where there is none, it is damaged, or of other heads.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"heads '{directory}': no {CONFIG_FILE} in it; name a directory of {what} heads"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"heads '{directory}': {CONFIG_FILE} is damaged ({error}); export them again"
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"heads '{directory}': {CONFIG_FILE} is damaged (no object); export them again")
    for key in counts:
        value = config.get(key)
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"heads '{directory}': {key} is {value!r} in {CONFIG_FILE}; these are no {what} heads"
            )
    return config


def read_weights(directory: str | Path, stem: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU in their own dtypes: `stem` and the first of SUFFIXES that is there.

    A pickle is read by torch's loader of plain tensors, which runs no code. Raises UserError.
    """
    files = [Path(directory) / f"{stem}{suffix}" for suffix in SUFFIXES]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise UserError(f"heads '{directory}': there is no {files[0].name} or {SUFFIXES[1]} in it")
    return read_tensors(directory, path)


def read_tensors(directory: str | Path, path: Path) -> dict[str, Tensor]:
    """The tensors of one file of a directory, as `read_weights`."""
    try:
        if path.suffix == SUFFIXES[0]:
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(
            f"heads '{directory}': {path.name} is cut short, damaged or holds more than tensors, which could run code; "
            "save a plain state_dict"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"heads '{directory}': {path.name} is cut short or damaged ({reason:.160})") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"heads '{directory}': {path.name} is no plain state_dict, names and tensors alone")
    return loaded


def write_heads(directory: Path, stem: str, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Fill a directory that is there: `stem`.safetensors, tensors that share memory written each, and config.json."""
    save_file(_apart(tensors), directory / f"{stem}{SUFFIXES[0]}", metadata={"format": "pt"})
    write_config(directory, config)


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """config.json in a directory that is there."""
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def require_names(directory: str | Path, stored: Iterable[str], wanted: Iterable[str], told: str) -> None:
    """Refuse a file that has other tensors than config.json makes us want; `told` is what that says."""
    theirs = set(stored)
    if differing := sorted(theirs ^ set(wanted)):
        what = "lacks" if differing[0] not in theirs else "has beside them"
        raise UserError(
            f"heads '{directory}': the file of weights {what} '{differing[0]}', by {CONFIG_FILE} there are {told}; "
            "export them again"
        )


def fill(
    heads: nn.Module,
    names: Mapping[str, str],
    state: Mapping[str, Tensor],
    directory: str | Path,
    backbone: Backbone,
) -> None:
    """Copy tensors into the parameters of heads for a model: `names`, a parameter's -> its tensor's.

    Nothing is copied unless all fit. Raises UserError for those of another size.
    """
    for name, parameter in heads.named_parameters():
        stored, ours = list(state[names[name]].shape), list(parameter.shape)
        if stored != ours:
            raise UserError(
                f"heads '{directory}' are of another model: {names[name]} is {stored}, and this one, of vocabulary "
                f"{backbone.vocab_size} and hidden size {backbone.hidden_size}, needs {ours}"
            )
    for name, parameter in heads.named_parameters():
        parameter.data.copy_(state[names[name]])


def require_base(directory: str | Path, config: dict[str, Any], backbone: Backbone) -> None:
    """Refuse a model with other weights than the one the heads were trained on, where that is known.

    A model on the meta device is not looked at, nor is one without files.
    """
    name, trained_on = backbone.model.name_or_path, config.get("base_fingerprint")
    if not name or trained_on is None or backbone.head.weight.is_meta:
        return
    if fingerprint(checkpoint_directory(name)) != trained_on:
        raise UserError(other_weights(directory, config, name))


def other_weights(directory: str | Path, config: dict[str, Any], name: str) -> str:
    """What is said of heads whose model has other weights than the one of this name."""
    return (
        f"heads '{directory}' were trained on '{config.get('base_model_name_or_path')}' with other weights than "
        f"'{name}' has (its fingerprint differs); use that model, or train heads for this one"
    )


def _may_be_a_layer(directory: Path) -> bool:
    """Whether a config.json, if there is one, may be that of a head that is one decoder layer."""
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("num_hidden_layers", 1) == 1


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, each with memory of its own, which safetensors asks for."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return apart
