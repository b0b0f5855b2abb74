"""The peak of memory: that of work whose needs are known, and nothing where the system does not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eval.memory import peak_memory, weight_bytes

CPU = torch.device("cpu")
MEGABYTE = 2**20
NOISE = 3  # MB: what Python does meanwhile, and the kernel's counters, which lag behind a little
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


def use(megabytes: int) -> None:
    """Fill memory and let go of it again."""
    torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)


@needs_proc
@pytest.mark.parametrize("megabytes", [8, 64])
def test_the_peak_is_what_the_work_needed(megabytes: int) -> None:
    use(200)  # an earlier peak must not show
    for _ in range(2):
        found = peak_memory(lambda: use(megabytes), CPU)
        assert found is not None
        assert abs(found.added / MEGABYTE - megabytes) < NOISE
        assert found.peak > found.added + 50 * MEGABYTE  # Python and torch


@needs_proc
def test_freed_memory_that_the_allocator_holds_back_is_counted_again() -> None:
    def use_pieces() -> list[torch.Tensor]:
        return [torch.ones(2**16, dtype=torch.uint8) for _ in range(32 * 2**4)]

    last = use_pieces()[-1]  # so that what lies below it cannot be given back in one piece
    found = peak_memory(use_pieces, CPU)
    assert found is not None
    assert abs(found.added / MEGABYTE - 32) < NOISE
    assert last.numel()


@needs_proc
def test_what_was_there_before_is_not_added() -> None:
    kept = torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    found = peak_memory(kept.max, CPU)
    assert found is not None
    assert found.added < NOISE * MEGABYTE


def test_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError

    done: list[int] = []
    monkeypatch.setattr(Path, "write_text", refuse)
    assert peak_memory(lambda: done.append(1), CPU) is None
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_text", refuse)
    assert peak_memory(lambda: done.append(1), CPU) is None
    assert done == [1, 1]


def test_a_failure_of_the_work_is_passed_on() -> None:
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0, CPU)


def test_weights_are_counted_once_and_where_they_are() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(3, 5, bias=False))
    assert weight_bytes(model, CPU) == 4 * (2 * 15 + 5)
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.zeros(7, dtype=torch.float64))
    assert weight_bytes(model, CPU) == 4 * (15 + 5) + 8 * 7
    assert weight_bytes(model, torch.device("meta")) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_tensors() -> None:
    device = torch.device("cuda")
    kept = torch.ones(32 * MEGABYTE, dtype=torch.uint8, device=device)
    found = peak_memory(lambda: torch.ones(8 * MEGABYTE, dtype=torch.uint8, device=device), device)
    assert found is not None
    assert found.added == 8 * MEGABYTE
    assert found.peak >= 40 * MEGABYTE
    del kept
