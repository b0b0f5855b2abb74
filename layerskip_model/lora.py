"""Low-rank adapters on the decoder layers (LoRA, arXiv 2106.09685), by peft; merged again for what is exported.

An adapted linear map computes W x + s B A dropout(x) with s = alpha / rank. W is frozen, A and B train in float32,
and B starts at zero, so that the model begins as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip_model.errors import UserError

ALL_LINEAR = "all-linear"
_ADAPTER = "default"  # peft's name of an only adapter


def add_lora(
    model: PreTrainedModel, *, rank: int, alpha: float, dropout: float, targets: str | Sequence[str]
) -> None:
    """Freeze `model` and give linear maps of its decoder layers adapters that train, drawn from torch's generator.

    `targets` are last parts of module names, such as q_proj, or ALL_LINEAR. The LM head has none: every exit reads
    its weight. Raises UserError for a target that matches nothing, naming those there are, and without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("model.lora: the peft package is not installed; pip install peft") from None
    chosen = _chosen(model, targets)
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen)  # type: ignore[arg-type]
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft makes them of the frozen weight's dtype


def has_lora(model: nn.Module) -> bool:
    """Whether `add_lora` has been at it."""
    return any(True for _ in _adapted(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before `add_lora` while this lasts. What trains stays as it is: nothing is frozen by it."""
    adapted = [layer for _, layer in _adapted(model)]
    for layer in adapted:
        layer._disable_adapters = True  # peft's own way also takes the gradients away, which DDP counts on
    try:
        yield
    finally:
        for layer in adapted:
            layer._disable_adapters = False


@torch.no_grad()
def merged_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + s B A in float32 under the names that the model has without adapters; everything else as it is.

    `state` is the whole state_dict of `model`, wherever it was gathered; the module's own weights are not read.
    """
    merged = dict(state)
    for name, layer in _adapted(model):
        down = merged.pop(f"{name}.lora_A.{_ADAPTER}.weight")  # [rank, in]
        up = merged.pop(f"{name}.lora_B.{_ADAPTER}.weight")  # [out, rank]
        weight = merged.pop(f"{name}.base_layer.weight").float()  # [out, in]
        merged[f"{name}.weight"] = weight + layer.scaling[_ADAPTER] * (up.float() @ down.float())
        if f"{name}.base_layer.bias" in merged:
            merged[f"{name}.bias"] = merged.pop(f"{name}.base_layer.bias")
    return merged


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted linear maps, with their names."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield name, module


def _chosen(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """The full names of the linear maps that the targets mean."""
    layers = model.get_decoder().layers
    inside = {id(module) for module in layers.modules()}
    there = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    ]
    if targets == ALL_LINEAR:
        return there
    known = sorted({name.rsplit(".", 1)[-1] for name in there})
    for target in targets:
        if target not in known:
            raise UserError(
                f"model.lora.targets: '{target}' is no linear map of this model's decoder layers; "
                f"there are {', '.join(known)}, or use all-linear"
            )
    return [name for name in there if name.rsplit(".", 1)[-1] in targets]
