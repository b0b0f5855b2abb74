from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from train.metrics import MetricSums, all_sum


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


class Ranks:
    """Stands for accelerate on two ranks: `reduce` adds what the other rank has."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, others: list[float], *, main: bool = True) -> None:
        self.others = others
        self.is_main_process = main

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return tensor + torch.tensor(self.others, dtype=tensor.dtype)


def test_means_are_sums_over_sums(accelerator: Accelerator) -> None:
    sums = MetricSums()
    sums.add({"a": (torch.tensor(6.0), torch.tensor(2)), "b": (1.0, 4.0)})
    sums.add({"a": (torch.tensor(1.0), torch.tensor(5))})
    assert sums.reduce(accelerator) == {"a": 1.0, "b": 0.25}  # not the mean of 3 and 0.2
    assert sums.reduce(accelerator) == {}
    sums.add({"a": (torch.tensor(8.0), torch.tensor(2))})
    assert sums.reduce(accelerator) == {"a": 4.0}


def test_what_counted_nothing_is_left_out(accelerator: Accelerator) -> None:
    sums = MetricSums()
    sums.add({"a": (torch.tensor(0.0), torch.tensor(0)), "b": (torch.tensor(0.0), torch.tensor(3))})
    assert sums.reduce(accelerator) == {"b": 0.0}


def test_no_graph_is_kept_alive() -> None:
    weight = torch.ones(3, requires_grad=True)
    sums = MetricSums()
    sums.add({"a": (weight.sum(), torch.tensor(1))})
    for total, count in sums._sums.values():
        assert not getattr(total, "requires_grad", False)
        assert not getattr(count, "requires_grad", False)


def test_many_small_numbers_on_a_large_sum_are_not_lost(accelerator: Accelerator) -> None:
    sums = MetricSums()
    sums.add({"a": (torch.tensor(float(2**24)), torch.tensor(2**24))})
    for _ in range(100):  # float32 would stay at 2^24
        sums.add({"a": (torch.tensor(1.0), torch.tensor(1))})
    assert sums.totals(accelerator) == {"a": [2.0**24 + 100, 2.0**24 + 100]}


def test_ranks_are_added_before_the_division() -> None:
    sums = MetricSums()
    sums.add({"b": (torch.tensor(1.0), torch.tensor(1)), "a": (torch.tensor(6.0), torch.tensor(2))})
    ranks: Any = Ranks([4.0, 8.0, 0.0, 1.0])  # a and b of the other rank, in the order of their names
    assert sums.reduce(ranks) == {"a": 1.0, "b": 0.5}


def test_restored_sums_are_counted_once() -> None:
    totals = {"a": [6.0, 2.0]}
    for main, expected in ((True, 9.0 / 5.0), (False, 3.0 / 3.0)):
        sums = MetricSums()
        ranks: Any = Ranks([1.0, 2.0], main=main)
        sums.restore(totals, ranks)
        sums.add({"a": (torch.tensor(2.0), torch.tensor(1))})
        assert sums.reduce(ranks) == {"a": expected}


def test_all_sum_is_exact_in_float64(accelerator: Accelerator) -> None:
    value = 2.0**40 + 1.0
    assert all_sum(accelerator, [value]) == [value]
    ranks: Any = Ranks([1.0])
    assert all_sum(ranks, [value]) == [value + 1.0]
