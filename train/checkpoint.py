"""Checkpoints: what trains, the optimizer's state and the step; written aside and renamed, so never half there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from layerskip_model.errors import UserError
from train.metrics import Totals
from train.objectives import Objective

PREFIX = "step-"


def save_checkpoint(
    directory: Path,
    step: int,
    objective: Objective[Any],
    optimizer: torch.optim.Optimizer,
    keep: int,
    metrics: Totals | None = None,
) -> Path:
    """Write `directory/step-N` after N finished steps and remove all but the newest `keep`. Main process only.

    `metrics` are the sums that have not been logged yet.
    """
    target = directory / f"{PREFIX}{step:08d}"
    for leftover in directory.glob(f".{PREFIX}*"):  # of a process that was killed
        shutil.rmtree(leftover)
    partial = directory / f".{target.name}.partial"
    partial.mkdir(parents=True)
    state = {name: tensor.detach().contiguous() for name, tensor in objective.trainable_state().items()}
    save_file(state, partial / "trainable.safetensors")
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps({"step": step, "metrics": metrics or {}}) + "\n")
    replace_directory(partial, target)
    for path in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")))  # never half of one under its name
    return target


def load_checkpoint(path: Path, objective: Objective[Any], optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint back; the number of finished steps. Raises UserError for one that cannot be read."""
    try:
        objective.load_trainable_state(load_file(path / "trainable.safetensors"))
        optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))
        return int(json.loads((path / "state.json").read_text())["step"])
    except Exception as error:  # a damaged file can fail in any reader
        raise UserError(
            f"checkpoint {path} cannot be resumed ({' '.join(str(error).split())[:200]}); "
            "delete it to go on from the one before, or pass --fresh"
        ) from error


def load_metrics(path: Path) -> Totals:
    """The sums that were not logged yet when a checkpoint was saved."""
    return json.loads((path / "state.json").read_text())["metrics"]


def list_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob(f"{PREFIX}*") if (path / "state.json").is_file())


def replace_directory(source: Path, target: Path) -> None:
    """Rename a finished directory into place, over an older one if there is one."""
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)
    else:
        source.rename(target)
