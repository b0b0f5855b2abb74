"""The processes of one launch, and their end."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch

PATIENCE = timedelta(hours=24)  # one process prepares data, exports or has the longest work; the others wait


def are_together() -> bool:
    """Whether this process has found others that were launched with it."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave(status: int) -> None:
    """End this process, with its exit status, if it is together with others; else do nothing.

    It ends at once: threads of a process group that are still running when C++ takes the process down
    abort it now and then, after all its work is done.
    """
    if not are_together():
        return
    if status == 0:
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
