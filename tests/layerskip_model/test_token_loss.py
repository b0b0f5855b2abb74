"""The chunked losses against full logits: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from layerskip_model import head_map
from layerskip_model.head_map import HeadMap
from layerskip_model.token_loss import (
    IGNORE_INDEX,
    cross_entropy_sum,
    kl_divergence_sum,
    predictions,
    soft_cross_entropy_sum,
    weighted_cross_entropy,
    weighted_kl_divergence,
)

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB = 13, 6, 5, 11
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 2.0, "softcap": 2.5},
}
Loss = Callable[[Tensor, HeadMap], Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[1, 4, TOKENS], autouse=True, ids=lambda rows: f"chunk{rows}")
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_map, "CPU_CHUNK_BYTES", 4 * VOCAB * request.param)


@pytest.fixture(params=list(HEADS))
def head(request: pytest.FixtureRequest) -> HeadMap:
    return make_head(**HEADS[request.param])


def make_head(
    bias: bool = False,
    width: int = HIDDEN,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    softcap: float | None = None,
) -> HeadMap:
    return HeadMap(
        torch.randn(VOCAB, width, dtype=dtype, requires_grad=True),
        torch.randn(VOCAB, dtype=dtype, requires_grad=True) if bias else None,
        scale,
        softcap,
    )


def make_hidden(width: int = HIDDEN, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(TOKENS, width, dtype=dtype, requires_grad=True)


def trained(hidden: Tensor, head: HeadMap) -> list[Tensor]:
    return [tensor for tensor in (hidden, head.weight, head.bias) if tensor is not None]


def make_labels() -> Tensor:
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[[0, 5, 6]] = IGNORE_INDEX
    return labels


def naive_logits(hidden: Tensor, head: HeadMap) -> Tensor:
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logits = head.scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def naive_hard(hidden: Tensor, labels: Tensor, head: HeadMap) -> Tensor:
    total = hidden.new_zeros(())
    for row, label in zip(naive_logits(hidden, head), labels.tolist(), strict=True):
        if label != IGNORE_INDEX:
            total = total - row[label] + row.exp().sum().log()
    return total


def naive_soft(
    hidden: Tensor, teacher_hidden: Tensor, head: HeadMap, teacher_head: HeadMap, mask: Tensor
) -> Tensor:
    p = naive_logits(hidden, head).softmax(-1)
    q = naive_logits(teacher_hidden, teacher_head).detach().softmax(-1)
    return -(q * p.log()).sum(-1)[mask].sum()


def naive_kl(
    hidden: Tensor, teacher_hidden: Tensor, head: HeadMap, teacher_head: HeadMap, mask: Tensor
) -> Tensor:
    p = naive_logits(hidden, head).softmax(-1)
    q = naive_logits(teacher_hidden, teacher_head).detach().softmax(-1)
    return (q * (q / p).log()).sum(-1)[mask].sum()


def assert_twins(fast: Loss, naive: Loss, hidden: Tensor, head: HeadMap) -> None:
    """The same value and the same gradients, with an incoming gradient that is not one."""
    inputs = trained(hidden, head)
    values, gradients = [], []
    for loss in (fast, naive):
        value = loss(hidden, head)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(0.3 * value, inputs))
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


def test_logits_are_the_formula(head: HeadMap) -> None:
    hidden = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(head.logits(hidden), naive_logits(hidden, head))
    assert head.logits(hidden.bfloat16()).dtype == torch.bfloat16


def test_hard_labels_match_full_logits(head: HeadMap) -> None:
    labels = make_labels()
    assert_twins(
        lambda h, m: cross_entropy_sum(h, labels, m),
        lambda h, m: naive_hard(h, labels, m),
        make_hidden(),
        head,
    )


@pytest.mark.parametrize(
    ("fast", "naive"), [(soft_cross_entropy_sum, naive_soft), (kl_divergence_sum, naive_kl)]
)
def test_soft_labels_match_full_logits(head: HeadMap, fast: Any, naive: Any) -> None:
    teacher_hidden = make_hidden(TEACHER_HIDDEN)
    teacher_head = make_head(bias=True, width=TEACHER_HIDDEN, scale=0.5, softcap=4.0)
    mask = make_labels() != IGNORE_INDEX
    assert_twins(
        lambda h, m: fast(h, teacher_hidden, m, teacher_head, mask),
        lambda h, m: naive(h, teacher_hidden, m, teacher_head, mask),
        make_hidden(),
        head,
    )
    fast(make_hidden(), teacher_hidden, head, teacher_head, mask).backward()
    assert teacher_hidden.grad is None
    assert teacher_head.weight.grad is None


def test_divergence_from_itself_is_zero(head: HeadMap) -> None:
    hidden = make_hidden()
    divergence = kl_divergence_sum(hidden, hidden, head, head, torch.ones(TOKENS, dtype=torch.bool))
    assert abs(divergence.item()) < 1e-12
    divergence.backward()
    torch.testing.assert_close(head.weight.grad, torch.zeros_like(head.weight))


def naive_weighted(states: list[Tensor], weights: list[float], labels: Tensor, head: HeadMap) -> Tensor:
    total = states[0].new_zeros(())
    for hidden, weight in zip(states, weights, strict=True):
        total = total + weight * naive_hard(hidden, labels, head)
    return total


@pytest.mark.parametrize("frozen", ["nothing", "head", "first", "second"])
def test_several_states_over_one_head_match_full_logits(head: HeadMap, frozen: str) -> None:
    """Also where the head, or one of the states, gets no gradient."""
    labels, weights = make_labels(), [0.5, 0.2, 0.3]
    states = [make_hidden() for _ in weights]
    states[0].requires_grad_(frozen != "first")
    states[1].requires_grad_(frozen != "second")
    of_head = trained(states[0], head)[1:]
    for tensor in of_head:
        tensor.requires_grad_(frozen != "head")
    inputs = [tensor for tensor in (*states, *of_head) if tensor.requires_grad]
    fast, each = weighted_cross_entropy(iter(states), weights, labels, head)
    naive = naive_weighted(states, weights, labels, head)
    torch.testing.assert_close(fast, naive)
    torch.testing.assert_close(each, [naive_hard(hidden, labels, head).detach() for hidden in states])
    assert not any(loss.requires_grad for loss in each)
    torch.testing.assert_close(
        torch.autograd.grad(0.3 * fast, inputs), torch.autograd.grad(0.3 * naive, inputs)
    )


def test_each_of_several_states_has_its_own_teachers(head: HeadMap) -> None:
    """A row's teacher stands where `places` says; a teacher may stand for several, and some for none."""
    teacher_hidden = make_hidden(TEACHER_HIDDEN)
    teacher_head = make_head(bias=True, width=TEACHER_HIDDEN)
    states, weights = [make_hidden(), make_hidden()], [0.5, 0.2]
    places = [torch.arange(TOKENS), torch.arange(TOKENS).flip(0) // 2]
    places[0][3:6] = IGNORE_INDEX
    places[1][::3] = IGNORE_INDEX
    inputs = [*states, *trained(states[0], head)[1:]]
    fast, each = weighted_kl_divergence(iter(states), weights, teacher_hidden, places, head, teacher_head)
    naive = [
        naive_kl(hidden, teacher_hidden[own.clamp(min=0)], head, teacher_head, own != IGNORE_INDEX)
        for hidden, own in zip(states, places, strict=True)
    ]
    total = weights[0] * naive[0] + weights[1] * naive[1]
    torch.testing.assert_close(fast, total)
    torch.testing.assert_close(each, [loss.detach() for loss in naive])
    torch.testing.assert_close(torch.autograd.grad(fast, inputs), torch.autograd.grad(total, inputs))
    assert teacher_head.weight.grad is None


def test_gradients_are_slopes() -> None:
    """Of the loss itself, without autograd on the other side: central differences along random directions."""
    labels, head = make_labels(), make_head(bias=True, scale=0.5, softcap=3.0)
    inputs = [make_hidden(), *trained(make_hidden(), head)]

    def loss(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = replace(head, weight=weight, bias=bias)
        return weighted_cross_entropy([first, second], [0.7, 0.3], labels, moved)[0]

    gradients = torch.autograd.grad(loss(*inputs), inputs)
    for place, gradient in enumerate(gradients):
        direction, small = torch.randn_like(gradient), 1e-6
        there, back = ([*inputs] for _ in range(2))
        there[place], back[place] = inputs[place] + small * direction, inputs[place] - small * direction
        slope = (loss(*there) - loss(*back)) / (2 * small)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_matches_torch() -> None:
    labels = make_labels()
    options = torch.nn.LinearCrossEntropyOptions()
    assert_twins(
        lambda h, m: cross_entropy_sum(h, labels, m),
        lambda h, m: F.linear_cross_entropy(h, m.weight, labels, options=options, reduction="sum"),
        make_hidden(dtype=torch.float32),
        make_head(dtype=torch.float32),
    )


def test_rows_that_do_not_count_change_nothing() -> None:
    """Padding may hold anything, infinities included."""
    labels, head, hidden = make_labels(), make_head(bias=True), make_hidden()
    expected = torch.autograd.grad(cross_entropy_sum(hidden, labels, head), (hidden, head.weight))
    spoilt = hidden.detach().clone()
    spoilt[labels == IGNORE_INDEX] = math.nan
    spoilt.requires_grad_()
    actual = torch.autograd.grad(cross_entropy_sum(spoilt, labels, head), (spoilt, head.weight))
    torch.testing.assert_close(actual, expected)
    assert (actual[0][labels == IGNORE_INDEX] == 0).all()


@pytest.mark.parametrize("tokens", [0, TOKENS])
@pytest.mark.parametrize("name", ["hard", "soft", "kl"])
def test_nothing_counted_is_zero(tokens: int, name: str) -> None:
    hidden = make_hidden().detach()[:tokens].requires_grad_()
    head = make_head(bias=True, softcap=2.0)
    if name == "hard":
        loss = cross_entropy_sum(hidden, torch.full((tokens,), IGNORE_INDEX), head)
    else:
        function = soft_cross_entropy_sum if name == "soft" else kl_divergence_sum
        loss = function(hidden, hidden, head, head, torch.zeros(tokens, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    for tensor in trained(hidden, head):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()


def test_tied_embedding_and_several_calls_add_up() -> None:
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, requires_grad=True)
    tokens, labels, more = torch.randint(VOCAB, (TOKENS,)), make_labels(), make_labels()

    def total(loss: Callable[[Tensor, Tensor, HeadMap], Tensor]) -> Tensor:
        embedded, head = F.embedding(tokens, weight), HeadMap(weight)
        return loss(embedded, labels, head) + 2 * loss(embedded.tanh(), more, head)

    fast, naive = total(cross_entropy_sum), total(naive_hard)
    torch.testing.assert_close(fast, naive)
    torch.testing.assert_close(torch.autograd.grad(fast, weight), torch.autograd.grad(naive, weight))


def test_hidden_may_be_a_strided_view(head: HeadMap) -> None:
    labels, wide = make_labels(), torch.randn(HIDDEN, 2 * TOKENS, dtype=torch.float64)
    strided = wide[:, ::2].t().requires_grad_()
    assert not strided.is_contiguous()
    assert_twins(
        lambda h, m: cross_entropy_sum(h, labels, m),
        lambda h, m: naive_hard(h, labels, m),
        strided,
        head,
    )


def test_predictions(head: HeadMap) -> None:
    hidden, labels = make_hidden(), make_labels()
    nll, best = predictions(hidden, labels, head)
    logits = naive_logits(hidden, head)
    expected = F.cross_entropy(logits, labels, reduction="none").detach()
    torch.testing.assert_close(nll, expected.float())
    assert (nll[labels == IGNORE_INDEX] == 0).all()
    assert torch.equal(best, logits.argmax(-1))
    assert not nll.requires_grad
