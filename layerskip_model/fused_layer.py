"""A decoder layer as a dozen torch calls: one matmul for queries, keys and values, one for gate and up.

On small models and on fast GPUs the Python and the launches of a layer cost more than its arithmetic. A layer that
is made of Llama's parts is rebuilt here over its own weights. That it computes what the layer computes is checked
by `Runner`, which calls the model's own layers otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]

LAYER = ("input_layernorm", "mlp", "post_attention_layernorm", "self_attn")
ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
MLP = ("act_fn", "down_proj", "gate_proj", "up_proj")


class NotFusible(Exception):
    """The layer is not made of Llama's parts."""


class FusedLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)), over the layer's own weights.

    The projections' weights become views of one fused matrix: nothing is held twice, and the layer still works.
    Raises NotFusible for a layer with other parts, or with parts that are not plain (quantized, offloaded).
    """

    def __init__(self, layer: nn.Module, index: int) -> None:
        norms = ("k_norm", "q_norm") if hasattr(getattr(layer, "self_attn", None), "q_norm") else ()
        _require_parts(layer, LAYER)
        attention: Any = _require_parts(layer.self_attn, sorted((*ATTENTION, *norms)))  # type: ignore[arg-type]
        mlp: Any = _require_parts(layer.mlp, MLP)  # type: ignore[arg-type]
        self.index = index
        self.head_dim: int = attention.head_dim
        self.query_heads = attention.q_proj.out_features // self.head_dim
        self.rotated_heads = self.query_heads + attention.k_proj.out_features // self.head_dim
        self.grouped = attention.k_proj.out_features != attention.q_proj.out_features
        self.scaling: float = attention.scaling
        self.input_norm = fast_norm(layer.input_layernorm)
        self.output_norm = fast_norm(layer.post_attention_layernorm)
        self.head_norms = (fast_norm(attention.q_norm), fast_norm(attention.k_norm)) if norms else None
        self.activation: Map = mlp.act_fn.forward  # a module's call costs more than what this does
        self.inner: int = mlp.gate_proj.out_features
        self.qkv = Linear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output = Linear([attention.o_proj])
        self.gate_up = Linear([mlp.gate_proj, mlp.up_proj])
        self.down = Linear([mlp.down_proj])

    def __call__(self, hidden: Tensor, batch: int, context: Any, kind: str) -> Tensor:
        """Run the layer. Hidden states [batch * rows, hidden] -> the same shape; `context` as in `Runner.run`."""
        heads = self.qkv(self.input_norm(hidden)).view(
            batch, -1, self.qkv.size // self.head_dim, self.head_dim
        )
        rotated = self._rotate(heads[:, :, : self.rotated_heads], *context.rotary[kind])
        keys, values = context.cache.update(
            rotated[:, self.query_heads :], heads[:, :, self.rotated_heads :].transpose(1, 2), self.index
        )
        mask = context.masks[kind]
        mixed = F.scaled_dot_product_attention(
            rotated[:, : self.query_heads],
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and context.is_causal,
            scale=self.scaling,
            enable_gqa=self.grouped,
        )
        hidden = self.output.added_to(hidden, mixed.transpose(1, 2).reshape(hidden.shape[0], -1))
        inner = self.gate_up(self.output_norm(hidden))
        return self.down.added_to(hidden, self.activation(inner[:, : self.inner]) * inner[:, self.inner :])

    def _rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, rows, heads, head dim] -> rotated, [batch, heads, rows, head dim]. Tables as in `signed`."""
        if self.head_norms is not None:
            query_norm, key_norm = self.head_norms
            queries, keys = heads[:, :, : self.query_heads], heads[:, :, self.query_heads :]
            heads = torch.cat((query_norm(queries), key_norm(keys)), dim=2)
        return torch.addcmul(heads * cos, heads.roll(self.head_dim // 2, -1), sin).transpose(1, 2)


class Linear:
    """One or several linear maps of the same input as one matmul; their weights become views of its matrix."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        if any(type(part) is not nn.Linear or part.weight.is_meta for part in parts):
            raise NotFusible
        weight: Tensor = parts[0].weight.detach()
        bias: Tensor | None = parts[0].bias
        if len(parts) > 1:
            weight = torch.cat([part.weight.detach() for part in parts])
            for part, view in zip(parts, weight.split([part.out_features for part in parts]), strict=True):
                part.weight.data = view
            if any((part.bias is None) != (bias is None) for part in parts):
                raise NotFusible
            bias = None if bias is None else torch.cat([part.bias.detach() for part in parts])
        self.transposed = weight.t()  # [in, out]
        self.bias = bias
        self.size = weight.shape[0]

    def __call__(self, inputs: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        if self.bias is None:
            return torch.mm(inputs, self.transposed)
        return torch.addmm(self.bias, inputs, self.transposed)

    def added_to(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        """hidden [rows, out] plus the map of inputs [rows, in]."""
        output = torch.addmm(hidden, inputs, self.transposed)
        return output if self.bias is None else output + self.bias


def fuse(layers: Sequence[nn.Module]) -> list[FusedLayer]:
    """All these layers. Raises NotFusible where one of them is not made of Llama's parts."""
    with torch.inference_mode(False), torch.no_grad():
        return [FusedLayer(layer, index) for index, layer in enumerate(layers)]


def fast_norm(norm: Any) -> Map:
    """torch's RMS norm where it computes what this module computes, else the module."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if (
        not isinstance(weight, Tensor)
        or not isinstance(eps, float)
        or weight.is_meta
        or hasattr(norm, "_hf_hook")
    ):
        return norm
    shape = weight.shape
    sample = torch.linspace(-3.0, 3.0, 2 * weight.numel(), device=weight.device).view(2, -1).to(weight.dtype)
    with torch.no_grad():
        ours, theirs = F.rms_norm(sample, shape, weight, eps), norm(sample)
    allowed = 4 * torch.finfo(weight.dtype).eps * float(theirs.abs().max())
    same = bool((ours - theirs).abs().max() <= allowed)
    return RMSNorm(weight.detach(), eps) if same else norm


@dataclass(frozen=True)
class RMSNorm:
    """torch's RMS norm over the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., size] -> the same shape."""
        return torch.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def signed(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables [1, length, dim] as a fused layer takes them, [1, length, 1, dim].

    rotate_half(x) is a roll by half the width with the first half's sign turned; the sign goes into the table.
    """
    half = sin.shape[-1] // 2
    return cos[:, :, None], torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)[:, :, None]


def _require_parts(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """The module, if it has these parts and nothing else that could change what it computes."""
    own = list(module.named_parameters(recurse=False))
    if (
        sorted(name for name, _ in module.named_children()) != list(names)
        or own
        or hasattr(module, "_hf_hook")
    ):
        raise NotFusible
    return module
