"""Losses over the vocabulary that never hold a tensor of [tokens, vocab].

The logits are made a few rows at a time, and the gradients of hidden states, weight and bias are made with
them, in the forward pass. Backward only multiplies what is there by the incoming gradient: it needs neither
the logits nor the weight, which an engine (FSDP, ZeRO-3) may have swapped out by then. It multiplies in place
and hands over what it has, so it runs once.

A loss that trains the weight holds one float32 gradient of the weight's size until its backward, however many
depths share the head: :func:`weighted_cross_entropy` adds them up in it.

Every loss is a sum over counted tokens; the caller divides once, by the count over the global batch.

torch's own ``linear_cross_entropy`` is the same idea for hard labels. It takes no softcap, no teacher and no
autocast, and sums bfloat16 losses in bfloat16. On two CPU cores it was as fast as this in float32 on a
vocabulary of 2048, and two to four times slower in bfloat16 or on a vocabulary of 32000: one path serves all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from layerskip_model.chunked_loss import OneHot, Soft, TargetOf, chunked_sum
from layerskip_model.head_map import HeadMap, chunks, matmul_dtype, wide_logits

IGNORE_INDEX = -100


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
    return weighted_cross_entropy([hidden], [1.0], labels, head)[0]


def weighted_cross_entropy(
    hidden: Iterable[Tensor], weights: Sequence[float], labels: Tensor | Sequence[Tensor], head: HeadMap
) -> tuple[Tensor, list[Tensor]]:
    """sum_i w_i CE_i over several hidden states and one head, and each CE_i.

    Args:
        hidden: normed hidden states [tokens, hidden], one for each weight. A generator holds one at a time.
        weights: w_i, for example e~(t, l) of arXiv 2404.16710.
        labels: as in :func:`cross_entropy_sum`, shared by all, or a list with one for each.
        head: as there.

    Returns:
        The weighted sum, a scalar as :func:`cross_entropy_sum` returns it, and the CE_i, without gradients.
    """
    if isinstance(labels, Tensor):
        counted, target = _hard_target(labels)
        return chunked_sum(hidden, weights, head, [counted] * len(weights), [target] * len(weights))
    each = [_hard_target(own) for own in labels]
    return chunked_sum(hidden, weights, head, [rows for rows, _ in each], [target for _, target in each])


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


def weighted_kl_divergence(
    hidden: Iterable[Tensor],
    weights: Sequence[float],
    teacher_hidden: Tensor,
    places: Sequence[Tensor],
    head: HeadMap,
    teacher_head: HeadMap,
) -> tuple[Tensor, list[Tensor]]:
    """sum_i w_i KL_i over several hidden states and one head, and each KL_i, as :func:`weighted_cross_entropy`.

    Args:
        hidden, weights, head: as there.
        teacher_hidden: the teacher's normed hidden states [places, its hidden].
        places: for each hidden state int64 [tokens], which of them a row's teacher is; ``IGNORE_INDEX`` where the
            row does not count.
        teacher_head: the teacher's map to logits, over the same vocabulary.
    """
    counted = [_indices(own != IGNORE_INDEX) for own in places]
    kept = [own[rows] for own, rows in zip(places, counted, strict=True)]
    targets = [_soft_target(teacher_hidden, own, teacher_head, less_entropy=True) for own in kept]
    return chunked_sum(hidden, weights, head, counted, targets)


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
    nll, best = top_predictions(hidden, labels, head, 1)
    return nll, best[:, 0]


@torch.no_grad()
def top_predictions(hidden: Tensor, labels: Tensor, head: HeadMap, number: int) -> tuple[Tensor, Tensor]:
    """As :func:`predictions`, with the `number` likeliest tokens, best first: int64 [tokens, number]."""
    head = head.to(matmul_dtype(hidden))
    nll = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    best = torch.zeros(len(labels), number, dtype=torch.int64, device=hidden.device)
    ignored = labels == IGNORE_INDEX
    for rows in chunks(len(hidden), head):
        log_p = F.log_softmax(wide_logits(hidden[rows], head), dim=-1)  # [chunk, vocab]
        chosen = log_p.gather(1, labels[rows].masked_fill(ignored[rows], 0)[:, None])[:, 0]
        nll[rows] = -chosen.masked_fill(ignored[rows], 0).float()
        best[rows] = log_p.argmax(-1, keepdim=True) if number == 1 else log_p.topk(number, dim=-1).indices
    return nll, best


@torch.no_grad()
def first_choices(hidden: Tensor, head: HeadMap) -> Tensor:
    """The likeliest token of every row of normed hidden states [tokens, hidden]: int64 [tokens]."""
    head = head.to(matmul_dtype(hidden))
    best = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    for rows in chunks(len(hidden), head):
        best[rows] = wide_logits(hidden[rows], head).argmax(-1)
    return best


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
    target = _soft_target(teacher_hidden, counted, teacher_head, less_entropy)
    return chunked_sum([hidden], [1.0], head, [counted], [target])[0]


def _soft_target(hidden: Tensor, places: Tensor, head: HeadMap, less_entropy: bool) -> TargetOf:
    """The teacher's distributions at `places` of its states, as `chunked_sum` wants them."""
    with torch.no_grad():
        head = head.to(matmul_dtype(hidden))

    def target(rows: slice) -> Soft:
        with torch.no_grad():
            return Soft.of(wide_logits(hidden[places[rows]], head), less_entropy=less_entropy)

    return target


def _hard_target(labels: Tensor) -> tuple[Tensor, TargetOf]:
    """The rows that count, and their labels as `chunked_sum` wants them."""
    counted = _indices(labels != IGNORE_INDEX)
    kept = labels[counted]
    return counted, lambda rows: OneHot(kept[rows])


def _indices(mask: Tensor) -> Tensor:
    """Where a bool [tokens] is True. Only these rows are computed: the others cost and can spoil nothing."""
    return mask.nonzero().squeeze(1)
