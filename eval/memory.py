"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import nn

RESET_PEAK = "5"  # written to clear_refs: VmHWM starts again from the resident size (proc(5))


@dataclass(frozen=True)
class Memory:
    """Bytes. peak: the most that was in use at once; added: how much of it was not in use before the work."""

    peak: int
    added: int


def peak_memory(work: Callable[[], object], device: torch.device) -> Memory | None:
    """Do the work and say what memory it took; None where the system does not tell.

    On CUDA: what tensors occupy on that GPU, weights included; what torch's allocator holds in reserve is not.
    Elsewhere: the resident size of this process. That holds Python, its libraries and whatever else this process
    keeps beside the weights, so the ratio of two peaks says little about two strategies; compare weights and
    `added`. Memory that was freed but that the
    allocator held back is returned to the system first, so that the work takes all it needs anew and `added` counts
    it. That makes its first accesses slower: do not time it. `added` is then repeatable to about 1 MB.
    """
    if device.type == "cuda":
        return _cuda(work, device)
    _return_freed_memory()
    before = _reset()
    work()
    peak = _status("VmHWM")
    return None if before is None or peak is None else Memory(peak, max(0, peak - before))


def weight_bytes(model: nn.Module, device: torch.device) -> int:
    """What the model itself occupies on the device."""
    tensors = chain(model.parameters(), model.buffers())
    return sum(tensor.nbytes for tensor in tensors if tensor.device == device)


def _cuda(work: Callable[[], object], device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    peak = torch.cuda.max_memory_allocated(device)
    return Memory(peak, peak - before)


def _return_freed_memory() -> None:
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset() -> int | None:
    """Let the peak start again from the resident size now, which is returned."""
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    """A size in /proc/self/status, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(sizes[0]) * 1024 if sizes else None
