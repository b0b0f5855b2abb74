"""The skip of layer dropout against a loop over single samples, and what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerskip_model.layer_dropout import run_kept_rows


def mixing_layer(
    hidden: Tensor, mask: Tensor, *, position_embeddings: tuple[Tensor, Tensor], extra: dict[str, Tensor]
) -> Tensor:
    """A layer that mixes the tokens of a sample by its mask and adds its positions; residual included."""
    cos, sin = position_embeddings
    return hidden + torch.tanh(mask[:, 0] @ hidden * cos + sin) * extra["shared"]


def naive(keep: np.ndarray, hidden: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, extra: Tensor) -> Tensor:
    rows = []
    for row in range(len(hidden)):
        if keep[row]:
            own = [part[row : row + 1] if len(part) == len(hidden) else part for part in (mask, cos, sin)]
            x = hidden[row : row + 1]
            rows.append(
                mixing_layer(x, own[0], position_embeddings=(own[1], own[2]), extra={"shared": extra})
            )
        else:
            rows.append(hidden[row : row + 1])
    return torch.cat(rows)


@pytest.mark.parametrize("batch_positions", [1, 4])
@pytest.mark.parametrize("kept", ["1111", "1011", "0100", "0000"])
def test_run_kept_rows_equals_a_loop_over_samples(kept: str, batch_positions: int) -> None:
    keep = np.array([letter == "1" for letter in kept])
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = random(4, 1, 5, 5)
    cos, sin = random(batch_positions, 5, 3), random(batch_positions, 5, 3)
    values = random(4, 5, 3)
    shared = random(5, 3)
    results = []
    for run in (0, 1):
        hidden, extra = values.clone().requires_grad_(), shared.clone().requires_grad_()
        if run:
            output = naive(keep, hidden, mask, cos, sin, extra)
        else:
            output = run_kept_rows(
                mixing_layer,
                keep,
                hidden,
                mask,
                position_embeddings=(cos, sin),
                extra={"shared": extra},
            )
        weights = torch.arange(60, dtype=torch.float64).view(4, 5, 3)
        gradients = torch.autograd.grad((output * weights).sum(), (hidden, extra), allow_unused=True)
        results.append((output, *gradients))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=1e-13)
    assert torch.equal(results[0][0][~keep], values[~keep])  # bit by bit, and not rescaled
    if keep.any():
        torch.testing.assert_close(results[0][2], results[1][2])
    else:
        assert torch.equal(results[0][2], torch.zeros_like(shared))  # in the graph, with zeros


def test_only_kept_rows_reach_the_layer_and_one_if_none_is_kept() -> None:
    seen = []

    def layer(hidden: Tensor) -> Tensor:
        seen.append(hidden[:, 0, 0].tolist())
        return hidden * 3

    hidden = torch.arange(4.0).view(4, 1, 1)
    for kept in ([1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]):
        keep = np.array(kept, dtype=bool)
        output = run_kept_rows(layer, keep, hidden)[:, 0, 0]
        expected = np.arange(4.0) * np.where(keep, 3, 1)
        assert output.tolist() == expected.tolist()
    assert seen == [[0.0, 1.0, 2.0, 3.0], [1.0, 3.0], [0.0]]


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("cached_positions", [1, 4])
def test_a_layer_that_nobody_keeps_runs_on_one_token(length: int, cached_positions: int) -> None:
    """Its mask and positions are cut alike; its output, which may be no number, changes nothing."""
    seen = []
    weight = torch.ones(3, requires_grad=True)

    def layer(hidden: Tensor, mask: Tensor, *, positions: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        seen.append([tuple(t.shape) for t in (hidden, mask, positions, *rotary)])
        return hidden * weight + mask.sum() * torch.inf

    hidden = torch.randn(4, length, 3, requires_grad=True)
    rotary = tuple(torch.randn(cached_positions, length, 2) for _ in range(2))
    output = run_kept_rows(
        layer,
        np.zeros(4, dtype=bool),
        hidden,
        torch.ones(4, 1, length, length),
        positions=torch.arange(length)[None].expand(cached_positions, -1),
        rotary=rotary,
    )
    assert seen == [[(1, 1, 3), (1, 1, 1, 1), (1, 1), (1, 1, 2), (1, 1, 2)]]
    assert torch.equal(output, hidden)
    gradients = torch.autograd.grad((output * 2).sum(), (hidden, weight))
    assert torch.equal(gradients[0], torch.full_like(hidden, 2.0))
    assert torch.equal(gradients[1], torch.zeros(3))


class Made(TorchDispatchMode):
    """Sums up the sizes of all tensors that are made; views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numel += tensor.numel()
        return result


@pytest.mark.parametrize(("kept", "copies"), [("11011101", 6), ("11110000", 0), ("00000000", 0)])
def test_taking_rows_out_copies_them_once_and_the_batch_once_each_way(kept: str, copies: int) -> None:
    """Forward: the kept rows (none where they are neighbours) and the batch; backward: the same."""
    keep = np.array([letter == "1" for letter in kept])
    hidden = torch.randn(8, 16, 4, requires_grad=True)
    row = hidden[0].numel()
    with Made() as forward:
        output = run_kept_rows(lambda x: x, keep, hidden * 1.0)
    gradient = torch.ones_like(output)
    with Made() as backward:
        output.backward(gradient)
    batch = 8 if keep.any() else 0
    token = 4  # of the one that runs where none is kept, and of its gradient
    own = 8 * row  # hidden * 1.0, and its gradient
    assert forward.numel - own <= (copies + batch) * row + token
    assert backward.numel - own <= (copies + batch) * row + 2 * token


def test_a_layer_in_another_dtype_gives_back_the_dtype_of_the_stream() -> None:
    output = run_kept_rows(lambda x: x.bfloat16() * 2, np.array([True, False]), torch.ones(2, 1, 1))
    assert output.dtype == torch.float32
    assert output.flatten().tolist() == [2.0, 1.0]


def test_decisions_for_another_batch_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="3 decisions"):
        run_kept_rows(lambda x: x, np.ones(3, dtype=bool), torch.ones(2, 1, 1))
