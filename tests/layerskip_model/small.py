"""Small settings and batches that several tests of early exits share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layerskip_model.early_exit import ExitLoss
from layerskip_model.layer_dropout import LayerDropout
from layerskip_model.token_loss import IGNORE_INDEX

KINDS = ("llama", "mistral", "qwen3", "gemma2", "olmo2")
TOLERANCE = 1e-5  # norms and softmaxes of float64 models compute in float32


def exit_loss(**changes: Any) -> ExitLoss:
    settings: dict[str, Any] = {
        "num_layers": 4,
        "total_steps": 40,
        "exits": [1, 2, 3, 4],
        "weights": "sum",
        "e_scale": 0.5,
        "curriculum": "none",
        "every": 1,
    }
    return ExitLoss(**(settings | changes))


def half_dropped(**changes: Any) -> LayerDropout:
    """Rates high enough that every layer drops rows, the first too."""
    settings: dict[str, Any] = {
        "p_max": 0.5,
        "over_depth": "constant",
        "over_time": "constant",
        "layers": "all",
        "num_layers": 4,
        "total_steps": 40,
        "seed": 0,
    }
    return LayerDropout(**(settings | changes))


def batch(rows: int = 6, length: int = 9, ignored: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(64, (rows, length + 1), generator=generator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    if ignored:
        labels[0, 3:] = IGNORE_INDEX
        labels[2] = IGNORE_INDEX
    return inputs, labels


def assert_same_gradients(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    for (name, left), (_, right) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert left.grad is not None, name
        wanted = torch.zeros_like(right) if right.grad is None else right.grad
        difference = (left.grad - wanted).abs().max().item()
        assert difference <= TOLERANCE * max(1.0, wanted.abs().max().item()), name
