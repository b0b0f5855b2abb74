"""The processes of one launch, before there is an Accelerator."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from layerskip_model.errors import UserError
from layerskip_model.processes import PATIENCE


def join() -> PartialState:
    """This process's place among those launched together; the first call lets them find each other.

    Raises UserError where the launcher asks for DeepSpeed and it is not installed.
    """
    if is_asked_for("DEEPSPEED") and find_spec("deepspeed") is None:
        raise UserError("the launch asks for DeepSpeed, which is not installed; pip install deepspeed")
    if torch.accelerator.is_available():
        return PartialState(timeout=PATIENCE)
    # Unless told that this is a CPU run, accelerate takes each process of one for a run of its own; told so, it
    # never asks DeepSpeed, which then wants to hear of the backend instead.
    if is_asked_for("DEEPSPEED"):
        return PartialState(backend="gloo", timeout=PATIENCE)
    return PartialState(cpu=True, timeout=PATIENCE)


def is_asked_for(engine: str) -> bool:
    """Whether the launcher asks for the engine "FSDP" or "DEEPSPEED"."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


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
