"""The first layers of a model as a checkpoint of its own: a draft model for engines that cannot exit early."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats.hub import hub_files
from layerskip_model.formats.huggingface import load_config, load_model, no_progress_bar, outline

# What lies beside the weights and the configuration, as patterns of file names: it is the whole model's.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
)


class DraftExport(NamedTuple):
    """What was written: E of L layers, parameters (tied ones once), their dtype and bytes."""

    exit_layer: int
    num_layers: int
    parameters: int
    dtype: torch.dtype
    bytes: int


def export_draft_model(model: str, exit_layer: int, directory: Path) -> DraftExport:
    """Write the first E layers of a checkpoint with its final norm, LM head and tokenizer, in its own dtype.

    Its logits are those of an early exit after layer E (section 4.3 of arXiv 2404.16710), which is how the first
    layers draft. Only the tensors that are kept are read.

    Args:
        model: a directory, or a hub name.
        exit_layer: E, from 1 to the number of layers - 1.
        directory: an empty one.

    Raises UserError for a model that is no decoder or stored quantized, and for an E that it does not have.
    """
    whole_config = load_config(model)
    if getattr(whole_config, "quantization_config", None) is not None:
        raise UserError(
            f"model '{model}' is stored quantized, in a form that only its engine reads; "
            "name the checkpoint that it was quantized from"
        )
    whole = outline(model, whole_config)
    if not 1 <= exit_layer < whole.num_layers:
        raise UserError(
            f"--exit_layer {exit_layer}: the model has {whole.num_layers} layers; "
            f"give a whole number from 1 to {whole.num_layers - 1}"
            if whole.num_layers > 1
            else f"model '{model}' has one layer only, and a draft model takes fewer than all"
        )
    config = first_layers(whole_config, exit_layer)
    _require_same_layers(whole, outline(model, config))
    draft = load_model(model, dtype="auto", config=config)
    draft.generation_config = GenerationConfig.from_model_config(draft.config)  # a stored one is copied below
    with no_progress_bar():
        draft.save_pretrained(directory)
    copy_files(model, directory)
    parameters = list(draft.parameters())
    return DraftExport(
        exit_layer,
        whole.num_layers,
        parameters=sum(parameter.numel() for parameter in parameters),
        dtype=draft.dtype,
        bytes=sum(parameter.nbytes for parameter in parameters),
    )


def first_layers(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """The configuration of a model's first `depth` layers: lists with an entry a layer are cut as well."""
    shallow = copy.deepcopy(config)
    sizes = shallow.get_text_config()
    for name, value in sizes.to_dict().items():
        is_per_layer = isinstance(value, list | tuple) and len(value) == sizes.num_hidden_layers
        if is_per_layer and not name.endswith("token_id"):  # several tokens may end a text
            setattr(sizes, name, list(value[:depth]))
    sizes.num_hidden_layers = depth
    return shallow


def _require_same_layers(whole: Backbone, draft: Backbone) -> None:
    """Refuse a model whose layers are built otherwise in a shallower one, scaled by the depth, say."""
    for number, (ours, theirs) in enumerate(zip(draft.layers, whole.layers, strict=False), start=1):
        pairs = zip(ours.named_modules(), theirs.named_modules(), strict=True)
        for (name, mine), (_, other) in pairs:
            differing = {key for key, _ in _settings(mine).items() ^ _settings(other).items()}
            if differing:
                setting = ".".join(filter(None, (name, min(differing))))
                raise UserError(
                    f"model type '{whole.model_type}' builds layer {number} otherwise in a model of "
                    f"{draft.num_layers} layers ({setting}), so its first layers are no model of their own"
                )


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module's constructor kept that is no tensor and no module."""
    plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    return plain | {"class": type(module).__name__}


def copy_files(model: str, directory: Path) -> None:
    """Tokenizer, chat template and generation settings of a checkpoint, byte by byte."""
    source = Path(model)
    if not source.is_dir():
        source = hub_files(f"model '{model}'", model, COPIED)
    for pattern in COPIED:
        for path in source.glob(pattern):
            if path.is_file():
                target = directory / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
