"""Attention to keys that all rows share, and to a few of each row's own, by torch's flash kernel on a CPU.

A softmax over both is the two softmaxes, mixed by the sums of exponentials that each has. And the kernel's backward
makes its shares again from whatever logarithm of that sum it is given: given that of both together, and the mixed
output, its gradients are those of the whole. So scores are never held; what is saved is as large as the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerskip_model.head_map import sum_dtype

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class MergedAttention(torch.autograd.Function):
    """`apply(query, keys, values, scaling, *own)` -> [batch, heads, seq, head dim], on a CPU.

    Row t of `query` [batch, heads, seq, head dim] sees `keys` and `values` [batch, kv heads, seq, head dim] up to t,
    and at t those of `own`, as large: keys first, then as many values.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, scaling: float, *own: Tensor
    ) -> Tensor:
        """See the class."""
        # The kernel takes for granted that each head's numbers lie side by side.
        query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
        group = query.shape[1] // keys.shape[1]
        own_keys, own_values = halves(own)
        of_shared, log_sum = _kernel(
            query, _to_all(keys, group), _to_all(values, group), 0.0, True, scale=scaling
        )
        scores = [_score(query, _to_all(key, group), scaling) for key in own_keys]  # [batch, heads, seq] each
        total = torch.stack([log_sum, *scores]).logsumexp(0)
        output = of_shared * (log_sum - total).exp().to(values.dtype)[..., None]
        for score, value in zip(scores, own_values, strict=True):
            output = output + (score - total).exp().to(values.dtype)[..., None] * _to_all(value, group)
        ctx.save_for_backward(query, keys, values, output, total, *own)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of all but the scaling."""
        query, keys, values, output, total, *own = ctx.saved_tensors
        group = query.shape[1] // keys.shape[1]
        own_keys, own_values = halves(own)
        of_query, of_keys, of_values = _kernel_backward(
            gradient,
            query,
            _to_all(keys, group),
            _to_all(values, group),
            output,
            total,
            0.0,
            True,
            scale=ctx.scaling,
        )
        mean = (gradient * output).sum(-1)
        of_own_keys, of_own_values = [], []
        for key, value in zip(own_keys, own_values, strict=True):
            score = _score(query, _to_all(key, group), ctx.scaling)
            share = (score - total).exp().to(values.dtype)
            said = (gradient * _to_all(value, group)).sum(-1)
            of_score = (share * (said - mean) * ctx.scaling)[..., None]
            of_query = of_query + of_score * _to_all(key, group)
            of_own_keys.append(_of_group(of_score * query, group))
            of_own_values.append(_of_group(share[..., None] * gradient, group))
        shared = _of_group(of_keys, group), _of_group(of_values, group)
        return of_query, *shared, None, *of_own_keys, *of_own_values


def halves(own: Any) -> tuple[Any, Any]:
    """Keys and values."""
    return own[: len(own) // 2], own[len(own) // 2 :]


def _score(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Of each row's own key, [batch, heads, seq, head dim] both, as wide as the kernel's sums: [batch, heads, seq]."""
    return (query * key).sum(-1, dtype=sum_dtype(query.dtype)) * scaling


def _to_all(part: Tensor, group: int) -> Tensor:
    """Each kv head to the heads that look at it, [batch, kv heads, ...] -> [batch, heads, ...]."""
    return part if group == 1 else part.repeat_interleave(group, dim=1)


def _of_group(gradient: Tensor, group: int) -> Tensor:
    """The way back."""
    return gradient if group == 1 else gradient.unflatten(1, (-1, group)).sum(2)
