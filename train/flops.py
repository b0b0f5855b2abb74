"""Floating-point operations of a training step, counted from the model's own matrices, and what devices can do.

Counted are the matrix products: linear maps, attention and the LM head. Norms, activations, softmaxes, the
optimizer and the lookup of embeddings are not; on small models they are visible beside the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerskip_model.backbone import Backbone

# Dense bfloat16 FLOPs a second by a part of the GPU's name; the longer first where one is part of another.
PEAK_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True)
class ModelFlops:
    """What one token of a training step costs, forward and backward.

    Attributes:
        layers: of each decoder layer's linear maps, [L]. A map that trains costs 6 FLOPs a weight, a frozen one
            4: it has no gradient, but passes one on.
        attention: of one layer, for each token of the context. The whole square counts, as in arXiv 2204.02311,
            though kernels for causal masks compute half of it.
        head: of one exit's logits.
        forward_layers: of the forward alone, [L]: what activation checkpointing does a second time.
    """

    layers: tuple[float, ...]
    attention: float
    head: float
    forward_layers: tuple[float, ...]

    def step(self, kept: Sequence[float], length: int, exits: int, predicted: float) -> float:
        """FLOPs of one step. The model's: recomputation is no part of them (see `recomputed`).

        Args:
            kept: rows of the global batch that run each layer, or their expected number, [L].
            length: tokens a row.
            exits: how many exits are on, the last layer's among them.
            predicted: tokens of the global batch whose label counts.
        """
        attention = self.attention * length
        layers = sum(rows * (layer + attention) for rows, layer in zip(kept, self.layers, strict=True))
        return layers * length + exits * predicted * self.head

    def recomputed(self, kept: Sequence[float], length: int) -> float:
        """FLOPs that activation checkpointing of every layer adds to `step` in the hardware."""
        attention = self.attention * length / 3.0
        layers = zip(kept, self.forward_layers, strict=True)
        return length * sum(rows * (layer + attention) for rows, layer in layers)


def model_flops(model: Any) -> ModelFlops:
    """Count a transformers causal language model, adapters included; it may be on the meta device.

    Count before an engine shards it. Raises UserError for a model that is not decoder-only.
    """
    backbone = Backbone(model)
    config = backbone.config
    head_dim = getattr(config, "head_dim", None) or backbone.hidden_size // config.num_attention_heads
    return ModelFlops(
        layers=tuple(sum(map(_step_flops, layer.modules())) for layer in backbone.layers),
        attention=12.0 * config.num_attention_heads * head_dim,
        head=_step_flops(backbone.head),
        forward_layers=tuple(
            sum(2.0 * _weights(part) for part in layer.modules()) for layer in backbone.layers
        ),
    )


def _step_flops(module: nn.Module) -> float:
    trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return (6.0 if trains else 4.0) * _weights(module)


def _weights(module: nn.Module) -> int:
    """Of a linear map, by its sizes: its weight may be quantized."""
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else 0


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most dense FLOPs a second of a device in bfloat16 or float16; None where that is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
