"""The clock of every measurement."""

from __future__ import annotations

import time

import torch


def now(device: torch.device) -> float:
    """Wall clock in seconds, when the device has done all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
