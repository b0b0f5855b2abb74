"""The processes of one launch, before there is an Accelerator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from layerskip_model.errors import UserError
from layerskip_model.processes import PATIENCE


def join() -> PartialState:
    """This process's place among those launched together; the first call lets them find each other."""
    # Unless told that this is a CPU run, accelerate takes each process of one for a run of its own.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


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
