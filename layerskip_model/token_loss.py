"""Losses over the vocabulary that never hold a tensor of [tokens, vocab].

The logits are made a few rows at a time, and the gradients of hidden states, weight and bias are made with
them, in the forward pass. Backward only multiplies what is there by the incoming gradient: it needs neither
the logits nor the weight, which an engine (FSDP, ZeRO-3) may have swapped out by then.

Each call that trains the weight keeps one float32 gradient of the weight's size until its backward: several
depths over one head cost less as one call on their rows concatenated.

Every loss is a sum over counted tokens; the caller divides once, by the count over the global batch.

torch's own ``linear_cross_entropy`` is the same idea for hard labels. It takes no softcap, no teacher and no
autocast, and sums bfloat16 losses in bfloat16. On two CPU cores it was as fast as this in float32 on a
vocabulary of 2048, and two to four times slower in bfloat16 or on a vocabulary of 32000: one path serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
# Of float32 logits; a few such buffers live at once. A CPU wants them small; an accelerator wants
# enough rows in a chunk to repay one read of the weight and one read and write of its gradient.
CPU_CHUNK_BYTES = 32 * 2**20
ACCELERATOR_CHUNK_BYTES = 256 * 2**20


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
        return replace(
            self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype)
        )


def cross_entropy_sum(hidden: Tensor, labels: Tensor, head: HeadMap) -> Tensor:
    """The sum of -log p(label) over the rows whose label is not ``IGNORE_INDEX``.

    Args:
        hidden: normed hidden states [tokens, hidden].
        labels: int64 [tokens], already shifted by the caller.
        head: the map to logits; its weight and bias get gradients where they require them.

    Returns:
        A float32 scalar (float64 for float64 inputs), in nats; exactly 0, with zero gradients, where no row
        counts. Matrix products run in the autocast dtype, or else in the dtype of ``hidden``; the softmax and
        the sums in float32.
    """
    counted = _indices(labels != IGNORE_INDEX)
    kept = labels[counted]
    return _chunked_sum(hidden.index_select(0, counted), head, lambda rows: _OneHot(kept[rows]))


def soft_cross_entropy_sum(
    hidden: Tensor, teacher_hidden: Tensor, head: HeadMap, teacher_head: HeadMap, mask: Tensor
) -> Tensor:
    """The sum over the rows in ``mask`` of -sum_v p_teacher(v) log p_student(v), in nats.

    Args:
        hidden: the student's normed hidden states [tokens, hidden].
        teacher_hidden: the teacher's [tokens, its hidden]; neither it nor ``teacher_head`` gets a gradient.
        head: the student's map to logits.
        teacher_head: the teacher's, over the same vocabulary.
        mask: bool [tokens], True where a row counts.

    Returns:
        A scalar as :func:`cross_entropy_sum` returns it. Its gradients are those of the KL divergence.
    """
    return _distillation_sum(hidden, teacher_hidden, head, teacher_head, mask, less_entropy=False)


def kl_divergence_sum(
    hidden: Tensor, teacher_hidden: Tensor, head: HeadMap, teacher_head: HeadMap, mask: Tensor
) -> Tensor:
    """The sum over the rows in ``mask`` of KL(teacher || student); as :func:`soft_cross_entropy_sum`."""
    return _distillation_sum(hidden, teacher_hidden, head, teacher_head, mask, less_entropy=True)


@torch.no_grad()
def predictions(hidden: Tensor, labels: Tensor, head: HeadMap) -> tuple[Tensor, Tensor]:
    """Per token, its loss and the head's first choice, without gradients.

    Args:
        hidden: normed hidden states [tokens, hidden].
        labels: int64 [tokens].
        head: the map to logits.

    Returns:
        -log p(label), float32 [tokens], 0 where the label is ``IGNORE_INDEX``; and the argmax of every row,
        ignored or not, int64 [tokens].
    """
    head = head.to(_matmul_dtype(hidden))
    nll = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    best = torch.zeros_like(labels)
    ignored = labels == IGNORE_INDEX
    for rows in _chunks(hidden, head):
        log_p = F.log_softmax(_wide_logits(hidden[rows], head), dim=-1)  # [chunk, vocab]
        chosen = log_p.gather(1, labels[rows].masked_fill(ignored[rows], 0)[:, None])[:, 0]
        nll[rows] = -chosen.masked_fill(ignored[rows], 0).float()
        best[rows] = log_p.argmax(-1)
    return nll, best


@dataclass(frozen=True)
class _OneHot:
    """The target distribution of a chunk of labels [chunk]."""

    labels: Tensor

    def loss(self, log_p: Tensor) -> Tensor:
        return -log_p.gather(1, self.labels[:, None]).sum()

    def subtract_from(self, p: Tensor) -> Tensor:
        return p.scatter_add_(1, self.labels[:, None], p.new_full((len(p), 1), -1.0))


@dataclass(frozen=True)
class _Soft:
    """A target distribution q [chunk, vocab] of a chunk, and its logarithm."""

    q: Tensor
    log_q: Tensor
    less_entropy: bool

    def loss(self, log_p: Tensor) -> Tensor:
        surprise = self.log_q - log_p if self.less_entropy else -log_p
        return surprise.mul_(self.q).sum()

    def subtract_from(self, p: Tensor) -> Tensor:
        return p.sub_(self.q)


_TargetOf = Callable[[slice], _OneHot | _Soft]


def _distillation_sum(
    hidden: Tensor,
    teacher_hidden: Tensor,
    head: HeadMap,
    teacher_head: HeadMap,
    mask: Tensor,
    less_entropy: bool,
) -> Tensor:
    """Cross entropy against a teacher, less the teacher's own entropy for the KL divergence."""
    counted = _indices(mask)
    with torch.no_grad():
        kept = teacher_hidden.index_select(0, counted)
        teacher_head = teacher_head.to(_matmul_dtype(teacher_hidden))

    def target(rows: slice) -> _Soft:
        log_q = F.log_softmax(_wide_logits(kept[rows], teacher_head), dim=-1)
        return _Soft(log_q.exp(), log_q, less_entropy)

    return _chunked_sum(hidden.index_select(0, counted), head, target)


def _chunked_sum(hidden: Tensor, head: HeadMap, target_of: _TargetOf) -> Tensor:
    """The summed loss of all rows of ``hidden`` [rows, hidden] against their targets."""
    inputs: list[Tensor | None] = [hidden, head.weight, head.bias]
    if not torch.is_grad_enabled():  # a Function is not told so, and would make gradients
        inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
    return _ChunkedLoss.apply(*inputs, head, target_of)


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients of a linear head, chunk by chunk, all in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadMap, target_of: _TargetOf
    ) -> Tensor:
        dtype = _matmul_dtype(hidden)
        head = replace(head, weight=weight, bias=bias).to(dtype)
        wide = _sum_dtype(dtype)
        ctx.dtypes = [hidden.dtype, weight.dtype, bias.dtype if bias is not None else wide]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(tensor, dtype=wide) if tensor is not None and needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        for rows in _chunks(hidden, head):
            h = hidden[rows].to(dtype)  # [chunk, hidden]
            loss, grad = _chunk_loss(h, head, target_of(rows), any(ctx.needs_input_grad))
            total += loss
            if grad is None:
                continue
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ head.weight
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), h)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if saved is None else (saved * grad_output).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None)


def _chunk_loss(
    h: Tensor, head: HeadMap, target: _OneHot | _Soft, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """A chunk's loss and, if wanted, its gradient with respect to h W^T + b: [chunk, vocab], float32."""
    logits = _wide_logits(h, head)
    log_p = F.log_softmax(logits, dim=-1)
    loss = target.loss(log_p)
    if not want_grad:
        return loss, None
    return loss, head.squash_backward(target.subtract_from(log_p.exp_()), logits)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, where ``total`` may be the wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _wide_logits(hidden: Tensor, head: HeadMap) -> Tensor:
    """Logits [chunk, vocab] of a chunk: the product in the dtype of the head, the rest in float32."""
    projected = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    return head.squash(projected.to(_sum_dtype(projected.dtype)))


def _chunks(hidden: Tensor, head: HeadMap) -> Iterator[slice]:
    """Slices of the rows of ``hidden`` [rows, hidden] whose logits fit the budget."""
    budget = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    step = max(1, budget // (4 * head.weight.shape[0]))
    return (slice(start, start + step) for start in range(0, hidden.shape[0], step))


def _indices(mask: Tensor) -> Tensor:
    """Where a bool [tokens] is True. Only these rows are computed: the others cost and can spoil nothing."""
    return mask.nonzero().squeeze(1)


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that autocast would run the head in; autocast leaves float64 alone."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
