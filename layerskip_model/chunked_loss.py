"""The autograd function under the losses of `token_loss`: loss and gradients of a head, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerskip_model.head_map import HeadMap, chunk_rows, chunks, matmul_dtype, sum_dtype


@dataclass(frozen=True)
class OneHot:
    """The target distribution of a chunk of labels [chunk]."""

    labels: Tensor

    def compare(self, logits: Tensor, grad: Tensor) -> Tensor:
        """The loss; its gradient by the logits is written to `grad`, both [chunk, vocab]."""
        torch.softmax(logits, -1, dtype=grad.dtype, out=grad)
        # From the likeliest token, as the label's own share may be too small for a number.
        log_sum = logits.amax(-1).to(grad.dtype) - grad.amax(-1).log()
        at_label = logits.gather(1, self.labels[:, None])[:, 0].to(grad.dtype)
        grad.scatter_add_(1, self.labels[:, None], grad.new_full((len(grad), 1), -1.0))
        return (log_sum - at_label).sum()


@dataclass(frozen=True)
class Soft:
    """A target distribution q [chunk, vocab] of a chunk, and its logarithm."""

    q: Tensor
    log_q: Tensor
    less_entropy: bool

    def compare(self, logits: Tensor, grad: Tensor) -> Tensor:
        """As `OneHot.compare`."""
        log_p = torch.log_softmax(logits, -1, dtype=grad.dtype, out=grad)
        surprise = self.log_q - log_p if self.less_entropy else -log_p
        grad.exp_().sub_(self.q)
        return surprise.mul_(self.q).sum()


TargetOf = Callable[[slice], OneHot | Soft]


def chunked_sum(
    states: Iterable[Tensor],
    weights: Sequence[float],
    head: HeadMap,
    counted: Sequence[Tensor],
    targets: Sequence[TargetOf],
) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum of each state's loss over its rows `counted` [rows], and the losses themselves."""
    total: Tensor | None = None
    losses: list[Tensor] = []
    shared: _SharedHead | None = None
    remaining = iter(states)
    for weight, rows, target_of in zip(weights, counted, targets, strict=True):
        hidden = next(remaining)
        shared = shared or _SharedHead(head, matmul_dtype(hidden), max(map(len, counted)))
        # The first of the chain stands for the head, and hands over the gradient that all of them add to.
        inputs = [hidden, total, *((head.weight, head.bias) if total is None else (None, None))]
        if not torch.is_grad_enabled():  # a Function is not told so, and would make gradients
            inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
        total, loss = _ChunkedLoss.apply(*inputs, shared, weight, rows, target_of)
        losses.append(loss)
        del hidden, inputs  # before the next state is made
    assert total is not None
    return total, losses


class _SharedHead:
    """A head in the dtype of its products, what every loss over it adds to, and room for one chunk.

    The room is used by chunk after chunk: a CPU takes several times longer to get new memory than to fill it.

    Attributes:
        grad_weight, grad_bias: wide gradients; None where they are not wanted.
    """

    def __init__(self, head: HeadMap, dtype: torch.dtype, rows: int) -> None:
        wide, device, (vocab, _) = sum_dtype(dtype), head.weight.device, head.weight.shape
        self.grad_weight, self.grad_bias = (
            torch.zeros_like(tensor, dtype=wide)
            if tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
            else None
            for tensor in (head.weight, head.bias)
        )
        with torch.no_grad():
            self.head = head.to(dtype)
        rows = min(rows, chunk_rows(head))
        narrow = dtype != wide
        self._product = torch.empty(rows, vocab, dtype=dtype, device=device)
        self._grad = torch.empty(rows, vocab, dtype=wide, device=device)
        # A CPU would widen the logits into new memory by itself.
        widens = narrow and device.type == "cpu"
        self._wide = torch.empty(rows, vocab, dtype=wide, device=device) if widens else None
        adds_apart = narrow and self.grad_weight is not None
        self._grad_weight_part = torch.empty_like(self.head.weight) if adds_apart else None

    def loss(self, h: Tensor, target: OneHot | Soft) -> tuple[Tensor, Tensor]:
        """The loss of a chunk h [chunk, hidden], and its gradient by h W^T + b: [chunk, vocab] in h's dtype."""
        rows = slice(0, len(h))
        product = torch.mm(h, self.head.weight.t(), out=self._product[rows])
        if self.head.bias is not None:
            product += self.head.bias
        logits = product if self._wide is None else self._wide[rows].copy_(product)
        if self.head.softcap is not None or self.head.scale != 1.0:
            logits = self.head.squash(logits.to(self._grad.dtype))
        grad = self._grad[rows]
        loss = target.compare(logits, grad)
        grad = self.head.squash_backward(grad, logits)
        return loss, grad if grad.dtype == h.dtype else product.copy_(grad)

    def add(self, grad: Tensor, h: Tensor, share: float) -> None:
        """A chunk's gradient [chunk, vocab] by h W^T + b, times `share`, to those of weight and bias."""
        if self.grad_bias is not None:
            self.grad_bias.add_(grad.sum(0, dtype=self.grad_bias.dtype), alpha=share)
        if self._grad_weight_part is not None and self.grad_weight is not None:
            self.grad_weight.add_(torch.mm(grad.t(), h, out=self._grad_weight_part), alpha=share)
        elif self.grad_weight is not None:
            self.grad_weight.addmm_(grad.t(), h, alpha=share)


class _ChunkedLoss(torch.autograd.Function):
    """`previous` + share * loss and the loss, with all gradients made chunk by chunk in the forward pass.

    Losses over one head are a chain: each passes the incoming gradient on to the one before.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        previous: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        shared: _SharedHead,
        share: float,
        counted: Tensor,
        target_of: TargetOf,
    ) -> tuple[Tensor, Tensor]:
        head, dtype = shared.head, shared.head.weight.dtype
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        wanted = any(part is not None for part in (grad_hidden, shared.grad_weight, shared.grad_bias))
        loss = torch.zeros((), dtype=sum_dtype(dtype), device=hidden.device)
        for rows in chunks(len(counted), head):
            places = rows if len(counted) == len(hidden) else counted[rows]
            h = hidden[places].to(dtype)  # [chunk, hidden]
            part, grad = shared.loss(h, target_of(rows))
            loss += part
            if not wanted:
                continue
            shared.add(grad, h, share)
            if grad_hidden is not None:
                grad_hidden[places] = grad @ head.weight
        ctx.share, ctx.hidden_dtype, ctx.is_chained = share, hidden.dtype, previous is not None
        ctx.gradients = (grad_hidden, shared.grad_weight, shared.grad_bias)
        ctx.head_dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias)]
        ctx.mark_non_differentiable(loss)
        ctx.set_materialize_grads(False)
        return (loss * share if previous is None else previous + loss * share), loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss went backward before and has given its gradients away; compute it anew"
            )
        (hidden, *of_head), ctx.gradients = ctx.gradients, None
        if hidden is not None:
            hidden = hidden.to(ctx.hidden_dtype).mul_(grad_total * ctx.share)
        weight, bias = (
            None if gradient is None or dtype is None else gradient.mul_(grad_total).to(dtype)
            for gradient, dtype in zip(of_head, ctx.head_dtypes, strict=True)
        )
        return hidden, grad_total if ctx.is_chained else None, weight, bias, None, None, None, None
