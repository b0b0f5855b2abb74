"""The map from hidden states to logits, and how it is computed a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# Of a chunk's float32 logits; about two such buffers live at once. An accelerator wants thousands of rows in a chunk,
# to repay two reads of the weight and a read and a write of its gradient. On a CPU some hundred repay them; more only
# make buffers that its caches do not hold and that it has to get anew: with a vocabulary of 2048 a step of Hydra's or
# EAGLE-3's heads took 0.78 to 0.97 of the time with 512 rows in place of 1500; with one of 16384 a LayerSkip step took
# 1.15 of the time with 64 rows in place of 512.
CPU_CHUNK_ROWS = 512
CPU_CHUNK_BYTES = 32 * 2**20
ACCELERATOR_CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class HeadMap:
    """The map from a normed hidden state to logits: softcap * tanh(scale * (h W^T + b) / softcap)."""

    weight: Tensor  # [vocab, hidden]
    bias: Tensor | None = None  # [vocab]
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., hidden], in the dtype of ``hidden``."""
        head = self.to(hidden.dtype)
        return head.squash(F.linear(hidden, head.weight, head.bias)).to(hidden.dtype)

    def squash(self, projected: Tensor) -> Tensor:
        """Scale and softcap, elementwise: logits from h W^T + b."""
        scaled = projected if self.scale == 1.0 else projected * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def squash_backward(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient of h W^T + b, from the gradient of the logits and the logits themselves."""
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap) ** 2)
        return grad if self.scale == 1.0 else grad * self.scale

    def to(self, dtype: torch.dtype) -> HeadMap:
        """The same map with weight and bias in ``dtype``."""
        if self.weight.dtype == dtype and (self.bias is None or self.bias.dtype == dtype):
            return self
        return replace(
            self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype)
        )


def wide_logits(hidden: Tensor, head: HeadMap) -> Tensor:
    """Logits [chunk, vocab] of a chunk: the product in the dtype of the head, the rest in float32."""
    projected = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    return head.squash(projected.to(sum_dtype(projected.dtype)))


def chunk_bytes(device: torch.device) -> int:
    """The budget of a chunk."""
    return CPU_CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES


def chunk_rows(head: HeadMap) -> int:
    """How many rows' logits fit the budget."""
    device = head.weight.device
    rows = max(1, chunk_bytes(device) // (4 * head.weight.shape[0]))
    return min(rows, CPU_CHUNK_ROWS) if device.type == "cpu" else rows


def chunks(number: int, head: HeadMap) -> Iterator[slice]:
    """Slices of so many rows, of `chunk_rows` each."""
    step = chunk_rows(head)
    return (slice(start, min(start + step, number)) for start in range(0, number, step))


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that autocast would run the head in; autocast leaves float64 alone."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
