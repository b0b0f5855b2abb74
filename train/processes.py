"""The processes of one launch, before there is an Accelerator."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from layerskip_model.errors import UserError

PATIENCE = timedelta(
    hours=24
)  # while the main process prepares data or exports, the others wait in a collective


def join() -> PartialState:
    """This process's place among those launched together; the first call lets them find each other."""
    # Unless told that this is a CPU run, accelerate takes each process of one for a run of its own.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def leave(status: int) -> None:
    """End this process, with its exit status, if it was launched together with others; else do nothing.

    It ends at once: threads of a process group that are still running when C++ takes the process down
    abort it now and then, after all its work is done.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if status == 0:
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def on_main_process(state: PartialState, work: Callable[[], None]) -> None:
    """Do `work` on the main process while the others wait. Its UserError is raised on all of them."""
    message: list[str | None] = [None]
    if state.is_main_process:
        try:
            work()
        except UserError as error:
            message[0] = str(error)
    broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(message[0])
