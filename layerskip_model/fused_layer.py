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
JOINED = ("attention", "hidden_norm", "input_layernorm")  # of an EAGLE-3 head's attention
MLP = ("act_fn", "down_proj", "gate_proj", "up_proj")


class NotFusible(Exception):
    """The layer is not made of Llama's parts."""


class FusedLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)), over the layer's own weights.

    The projections' weights become views of one fused matrix: nothing is held twice, and the layer still works.
    Raises NotFusible for a layer with other parts, or with parts that are not plain (quantized, offloaded).
    """

    def __init__(self, layer: nn.Module, index: int) -> None:
        _require_parts(layer, LAYER)
        attention = self._attention(layer)
        norms = ("k_norm", "q_norm") if hasattr(attention, "q_norm") else ()
        _require_parts(attention, sorted((*ATTENTION, *norms)))
        mlp: Any = _require_parts(layer.mlp, MLP)  # type: ignore[arg-type]
        self.index = index
        self.head_dim: int = attention.head_dim
        queries, keys = (part.out_features // self.head_dim for part in (attention.q_proj, attention.k_proj))
        self.rotated_split = [queries, keys]
        self.split = [queries + keys, keys]
        self.grouped = attention.k_proj.out_features != attention.q_proj.out_features
        self.scaling: float = attention.scaling
        self.input_norm = fast_norm(layer.input_layernorm)
        self.output_norm = fast_norm(layer.post_attention_layernorm)
        self.head_norms = (fast_norm(attention.q_norm), fast_norm(attention.k_norm)) if norms else None
        self.activation: Map = mlp.act_fn.forward  # a module's call costs more than what this does
        self.qkv = Linear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output = Linear([attention.o_proj])
        self.gate_up = Linear([mlp.gate_proj, mlp.up_proj])
        self.down = Linear([mlp.down_proj])

    def __call__(self, hidden: Tensor, batch: int, context: Any, kind: str) -> Tensor:
        """Run the layer. What enters it [batch * rows, width] -> [batch * rows, hidden].

        `context` as in `LayerRunner.run`.
        """
        hidden, normed = self._entering(hidden)
        heads = self.qkv(normed).view(batch, -1, self.qkv.size // self.head_dim, self.head_dim)
        rotated, values = heads.split(self.split, dim=2)
        queries, keys = self._rotate(rotated, *context.rotary[kind]).split(self.rotated_split, dim=1)
        keys, values = context.cache.update(keys, values.transpose(1, 2), self.index)
        mask = context.masks[kind]
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and context.is_causal,
            scale=self.scaling,
            enable_gqa=self.grouped,
        )
        hidden = self.output.added_to(hidden, mixed.transpose(1, 2).reshape(hidden.shape[0], -1))
        gate, up = self.gate_up(self.output_norm(hidden)).chunk(2, dim=1)
        return self.down.added_to(hidden, self.activation(gate) * up)

    def _attention(self, layer: Any) -> Any:
        """The module whose parts these are."""
        return layer.self_attn

    def _entering(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What the attention's output is added to, and what attention reads."""
        return inputs, self.input_norm(inputs)

    def _rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, rows, heads, head dim] -> rotated, [batch, heads, rows, head dim]. Tables as in `signed`."""
        if self.head_norms is not None:
            query_norm, key_norm = self.head_norms
            queries, keys = heads.split(self.rotated_split, dim=2)
            heads = torch.cat((query_norm(queries), key_norm(keys)), dim=2)
        return torch.addcmul(heads * cos, heads.roll(self.head_dim // 2, -1), sin).transpose(1, 2)


class FusedJoinedLayer(FusedLayer):
    """The layer of an EAGLE-3 head: attention reads [norm(E) ; norm(h)], and is added to h, or to norm(h).

    What enters it is [E ; h], twice as wide as what leaves it. Raises NotFusible as its base does.
    """

    def __init__(self, joined: Any, index: int) -> None:
        layer: Any = _require_parts(joined, ("layer",)).layer
        super().__init__(layer, index)
        self.embedded_norm = fast_norm(layer.self_attn.input_layernorm)
        self.hidden_norm = fast_norm(layer.self_attn.hidden_norm)
        self.norm_before_residual: bool = joined.norm_before_residual

    def _attention(self, layer: Any) -> Any:
        """See `FusedLayer`."""
        return _require_parts(layer.self_attn, JOINED).attention

    def _entering(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See `FusedLayer`."""
        embedded, hidden = inputs.chunk(2, dim=1)
        normed = self.hidden_norm(hidden)
        entering = torch.cat((self.embedded_norm(embedded), normed), dim=1)
        return normed if self.norm_before_residual else hidden, entering


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
        return [
            (FusedJoinedLayer if hasattr(layer, "layer") else FusedLayer)(layer, index)
            for index, layer in enumerate(layers)
        ]


def fast_norm(norm: Any) -> Map:
    """torch's RMS norm where it computes what this module computes, else the module."""
    if type(norm) is nn.Identity:  # in place of the input norm of an EAGLE head's layer
        return norm.forward
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
