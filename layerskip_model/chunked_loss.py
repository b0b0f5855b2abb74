"""The autograd function under the losses of `token_loss`: loss and gradients of a head, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

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
        surprise = log_sum(logits, grad) - logits.gather(1, self.labels[:, None])[:, 0].to(grad.dtype)
        grad.scatter_add_(1, self.labels[:, None], grad.new_full((len(grad), 1), -1.0))
        return surprise.sum()


@dataclass(frozen=True)
class Soft:
    """A target distribution q [chunk, vocab] of a chunk.

    `entropy` [chunk]: q's, where the loss goes without it, as the KL divergence does.
    """

    q: Tensor
    entropy: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, *, less_entropy: bool) -> Self:
        """From the teacher's logits [chunk, vocab]."""
        q = torch.softmax(logits, -1)
        return cls(q, log_sum(logits, q) - (q * logits).sum(-1) if less_entropy else None)

    def compare(self, logits: Tensor, grad: Tensor) -> Tensor:
        """As `OneHot.compare`."""
        torch.softmax(logits, -1, dtype=grad.dtype, out=grad)
        surprise = log_sum(logits, grad) - (self.q * logits).sum(-1)
        grad.sub_(self.q)
        return (surprise if self.entropy is None else surprise - self.entropy).sum()


def log_sum(logits: Tensor, shares: Tensor) -> Tensor:
    """log sum exp of logits [chunk, vocab] whose softmax is known, in the dtype of that: [chunk]."""
    # From the likeliest token, as another one's share may be too small for a number.
    return logits.amax(-1).to(shares.dtype) - shares.amax(-1).log()


Target = OneHot | Soft
TargetOf = Callable[[slice], Target]
Piece = tuple[int, slice | Tensor, Target]
"""Of which state, which of its rows, and what they should say; at most a chunk of rows."""


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
        inputs = [total, *((head.weight, head.bias) if total is None else (None, None)), hidden]
        if not torch.is_grad_enabled():  # a Function is not told so, and would make gradients
            inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
        pieces = _pieces(rows, target_of, len(hidden), head)
        total, loss = _ChunkedLoss.apply(shared, [weight], pieces, *inputs)
        losses.append(loss)
        del hidden, inputs  # before the next state is made
    assert total is not None
    return total, losses


def _pieces(counted: Tensor, target_of: TargetOf, rows: int, head: HeadMap) -> Iterator[Piece]:
    """Of a loss over one state, of whose `rows` some are `counted`."""
    for chunk in chunks(len(counted), head):
        yield 0, chunk if len(counted) == rows else counted[chunk], target_of(chunk)


def sum_of_pieces(
    states: Sequence[Tensor], weights: Sequence[float], head: HeadMap, pieces: Iterable[Piece]
) -> tuple[Tensor, list[Tensor]]:
    """As `chunked_sum` for states that are all there, in the order of the pieces: a target can serve several states."""
    inputs = [None, head.weight, head.bias, *states]
    if not torch.is_grad_enabled():
        inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
    shared = _SharedHead(head, matmul_dtype(states[0]), max(map(len, states)))
    total, *losses = _ChunkedLoss.apply(shared, weights, pieces, *inputs)
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

    def loss(self, h: Tensor, target: Target) -> tuple[Tensor, Tensor]:
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
    """`previous` + sum_i share_i * loss_i and the losses, with all gradients made piece by piece in the forward pass.

    Losses over one head are a chain: each passes the incoming gradient on to the one before.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shared: _SharedHead,
        shares: Sequence[float],
        pieces: Iterable[Piece],
        previous: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        head, dtype = shared.head, shared.head.weight.dtype
        grads = [
            torch.zeros_like(state, dtype=dtype) if needed else None
            for state, needed in zip(states, ctx.needs_input_grad[6:], strict=True)
        ]
        wanted = any(part is not None for part in (*grads, shared.grad_weight, shared.grad_bias))
        losses = torch.zeros(len(states), dtype=sum_dtype(dtype), device=head.weight.device)
        for index, rows, target in pieces:
            h = states[index][rows].to(dtype)  # [chunk, hidden]
            part, grad = shared.loss(h, target)
            losses[index] += part
            if not wanted:
                continue
            shared.add(grad, h, shares[index])
            grad_state = grads[index]
            if grad_state is not None:
                grad_state[rows] = grad @ head.weight
        ctx.shares, ctx.is_chained = shares, previous is not None
        ctx.gradients = (shared.grad_weight, shared.grad_bias, *grads)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias, *states)]
        total = sum(share * loss for share, loss in zip(shares, losses, strict=True))
        each = losses.unbind()
        ctx.mark_non_differentiable(*each)
        ctx.set_materialize_grads(False)
        return (total if previous is None else previous + total, *each)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss went backward before and has given its gradients away; compute it anew"
            )
        gradients, ctx.gradients = ctx.gradients, None
        of_head = [
            None if gradient is None or dtype is None else gradient.mul_(grad_total).to(dtype)
            for gradient, dtype in zip(gradients[:2], ctx.dtypes[:2], strict=True)
        ]
        of_states = [
            None if gradient is None else gradient.to(dtype).mul_(grad_total * share)
            for gradient, dtype, share in zip(gradients[2:], ctx.dtypes[2:], ctx.shares, strict=True)
        ]
        return None, None, None, grad_total if ctx.is_chained else None, *of_head, *of_states
