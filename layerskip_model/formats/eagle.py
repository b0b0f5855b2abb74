"""EAGLE and EAGLE-3 heads on disk, as released (github.com/SafeAILab/EAGLE).

`config.json` is the target's with one layer; ours beside it: `draft_head`, eagle or eagle3, the model, its fingerprint.
`model.safetensors` has of EAGLE `fc.*` and `layers.0.*`, of EAGLE-3 `fc.weight`, `midlayer.*`, `norm.weight`,
`lm_head.weight`, `d2t` and `t2d`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from layerskip_model.backbone import Backbone
from layerskip_model.eagle import EagleHead
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.formats import heads as files
from layerskip_model.reduced_vocabulary import ReducedVocabulary

STEM = "model"
KINDS = {"eagle": EagleHead, "eagle3": Eagle3Head}
Head = TypeVar("Head", EagleHead, Eagle3Head)


def _name(ours: str) -> str:
    """A parameter's name in a head -> its name in the file."""
    for begin, theirs in (
        ("layer.layer.layer.self_attn.attention.", "midlayer.self_attn."),
        ("layer.layer.layer.self_attn.", "midlayer."),
        ("layer.layer.layer.", "midlayer."),
        ("layer.layer.", "layers.0."),
        ("projection.", "lm_head."),
    ):
        if ours.startswith(begin):
            return theirs + ours.removeprefix(begin)
    return ours


def write_eagle(
    directory: Path,
    head: EagleHead | Eagle3Head,
    state: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    base: str,
    base_fingerprint: str,
) -> None:
    """Write a head for the model that is named `base` into a directory that is there."""
    names = [name for name, _ in head.named_parameters()]
    tensors = {_name(name): state[name].to(dtype).contiguous() for name in names}
    kind = "eagle3" if isinstance(head, Eagle3Head) else "eagle"
    config = {"draft_head": kind, "base_model_name_or_path": base, "base_fingerprint": base_fingerprint}
    if isinstance(head, Eagle3Head):
        tensors |= {"d2t": state["d2t"], "t2d": state["t2d"]}
        config["feature_layers"] = list(head.reads)  # type: ignore[assignment]
    files.write_heads(directory, STEM, tensors, config)


def load_eagle(directory: str | Path, backbone: Backbone) -> EagleHead | Eagle3Head:
    """The head in a directory, in float32, for the model that it was trained on."""
    config = files.read_config(directory, "EAGLE", ())
    stored = files.read_weights(directory, STEM)
    head: EagleHead | Eagle3Head
    if config["draft_head"] == "eagle3":
        head = Eagle3Head(backbone, ReducedVocabulary(stored["d2t"], stored["t2d"]), config["feature_layers"])
    else:
        head = EagleHead(backbone, bias="fc.bias" in stored)
    names = {name: _name(name) for name, _ in head.named_parameters()}
    files.fill(head, names, stored, directory, backbone)
    files.require_base(directory, config, backbone)
    return head
