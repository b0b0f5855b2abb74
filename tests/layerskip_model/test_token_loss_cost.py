"""What the chunked losses promise beside their values: memory, work, dtypes, independence of the weight."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip_model import head_map
from layerskip_model.head_map import HeadMap
from layerskip_model.token_loss import (
    IGNORE_INDEX,
    cross_entropy_sum,
    kl_divergence_sum,
    predictions,
    soft_cross_entropy_sum,
    weighted_cross_entropy,
)
from tests.layerskip_model.test_token_loss import (
    HIDDEN,
    VOCAB,
    make_head,
    make_hidden,
    make_labels,
    naive_hard,
    trained,
)

ROWS = 16  # of a chunk


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(head_map, "CPU_CHUNK_BYTES", 4 * VOCAB * ROWS)


class Watch(TorchDispatchMode):
    """Remembers the largest tensor made, and the matrix products that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0
        self.product_dtypes: set[torch.dtype] = set()
        self.on_made: Callable[[Tensor], object] = lambda tensor: None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.largest = max(self.largest, tensor.numel())
            self.on_made(tensor)
            if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
                self.products += 1
                self.product_dtypes.add(tensor.dtype)
        return result


def tensors_in(result: Any) -> Iterator[Tensor]:
    for item in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(item, Tensor):
            yield item


@pytest.mark.parametrize("name", ["hard", "soft", "kl", "predictions"])
def test_no_tensor_holds_all_logits(name: str) -> None:
    tokens = 4 * ROWS
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    head = make_head(bias=True, dtype=torch.float32, softcap=3.0)
    labels, mask = torch.randint(VOCAB, (tokens,)), torch.ones(tokens, dtype=torch.bool)
    with Watch() as watch:
        if name == "predictions":
            predictions(hidden, labels, head)
        elif name == "hard":
            cross_entropy_sum(hidden, labels, head).backward()
        else:
            function = soft_cross_entropy_sum if name == "soft" else kl_divergence_sum
            function(hidden, hidden, head, head, mask).backward()
    assert ROWS * VOCAB <= watch.largest <= tokens * HIDDEN < tokens * VOCAB


def test_frozen_inputs_cost_no_gradient() -> None:
    labels = make_labels()

    def products(train_hidden: bool, train_weight: bool, grad: bool = True) -> int:
        hidden, head = make_hidden().requires_grad_(train_hidden), make_head()
        head.weight.requires_grad_(train_weight)
        with torch.set_grad_enabled(grad), Watch() as watch:
            loss = cross_entropy_sum(hidden, labels, head)
        assert loss.requires_grad == (grad and (train_hidden or train_weight))
        return watch.products

    forward = products(False, False)
    assert forward == products(True, True, grad=False)
    assert products(True, False) == products(False, True) == 2 * forward
    assert products(True, True) == 3 * forward


def test_backward_needs_no_weight_and_runs_once() -> None:
    """A sharding engine takes the gathered weight away after the forward."""
    hidden, labels, head = make_hidden(), make_labels(), make_head()
    expected = torch.autograd.grad(naive_hard(hidden, labels, head), (hidden, head.weight))
    loss = cross_entropy_sum(hidden, labels, head)
    head.weight.data.fill_(math.nan)
    actual = torch.autograd.grad(loss, (hidden, head.weight), retain_graph=True)
    torch.testing.assert_close(actual, expected)
    with pytest.raises(RuntimeError, match="went backward before"):
        torch.autograd.grad(loss, (hidden, head.weight))


@pytest.mark.parametrize("trained_head", [True, False])
def test_states_of_one_head_share_one_gradient_that_backward_does_not_copy(trained_head: bool) -> None:
    states = [make_hidden(dtype=torch.float32) for _ in range(3)]
    weight = torch.randn(1 << 12, HIDDEN, requires_grad=trained_head)
    places: set[int] = set()  # of everything of its size; a copy of what lives is at another one

    def note(tensor: Tensor) -> None:
        if tensor.numel() == weight.numel():
            places.add(tensor.untyped_storage().data_ptr())

    with Watch() as watch:
        watch.on_made = note
        loss, _ = weighted_cross_entropy(states, [0.5, 0.3, 0.2], make_labels(), HeadMap(weight))
        loss.backward()
    assert len(places - {weight.data_ptr()}) == int(trained_head)
    assert (weight.grad is not None) == trained_head
    if weight.grad is not None:
        assert weight.grad.data_ptr() in places
    assert all(state.grad is not None for state in states)


def test_only_one_state_at_a_time_is_held() -> None:
    alive: list[int] = []
    made: list[weakref.ref[Tensor]] = []

    def states() -> Iterator[Tensor]:
        for _ in range(4):
            alive.append(sum(reference() is not None for reference in made))
            state = make_hidden() * 1.0
            made.append(weakref.ref(state))
            yield state
            del state

    weighted_cross_entropy(states(), [0.25] * 4, make_labels(), make_head())
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize("loss_name", ["hard", "kl"])
def test_autocast_is_close_and_gradients_keep_their_dtypes(loss_name: str) -> None:
    hidden, head = make_hidden(dtype=torch.float32), make_head(bias=True, dtype=torch.float32, softcap=5.0)
    labels, teacher = make_labels(), make_hidden(dtype=torch.float32)
    teacher_head = make_head(dtype=torch.float32)

    def loss() -> Tensor:
        if loss_name == "hard":
            return cross_entropy_sum(hidden, labels, head)
        return kl_divergence_sum(hidden, teacher, head, teacher_head, labels != IGNORE_INDEX)

    inputs = trained(hidden, head)
    exact = loss()
    exact_gradients = torch.autograd.grad(exact, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch() as watch:
        rounded = loss()
    assert watch.product_dtypes == {torch.bfloat16}
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)
    for gradient, expected in zip(torch.autograd.grad(rounded, inputs), exact_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 0.03 * expected.norm()


def test_weight_gradient_accumulates_in_float32() -> None:
    """4096 equal rows: in bfloat16 the sum would stall once an addend falls below half a unit of it."""
    hidden = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    weight = torch.zeros(VOCAB, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = cross_entropy_sum(hidden, torch.zeros(4096, dtype=torch.int64), HeadMap(weight))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), 4096 * math.log(VOCAB), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.dtype == torch.bfloat16
    expected = torch.full((VOCAB, 1), 4096 / VOCAB)
    expected[0] -= 4096
    torch.testing.assert_close(gradient.float(), expected, rtol=0.01, atol=0)
