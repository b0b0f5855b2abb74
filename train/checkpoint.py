"""Checkpoints: what trains, the optimizer's state and the step; written aside and renamed, so never half there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from layerskip_model.errors import UserError
from train.data.stream_rows import StreamState
from train.engine import Engine
from train.metrics import Totals

PREFIX = "step-"


class Saved(NamedTuple):
    """What a checkpoint tells beside what the engine holds."""

    step: int  # optimizer steps that are finished
    metrics: Totals  # the sums that were not logged yet
    stream: StreamState | None  # None for data on disk, which is a function of the step


def save_checkpoint(
    directory: Path,
    step: int,
    engine: Engine,
    keep: int,
    metrics: Totals | None = None,
    stream: StreamState | None = None,
    spared: int | None = None,
) -> Path:
    """Write `directory/step-N` after N finished steps and remove all but the newest `keep`. Every rank calls it.

    `metrics` are the sums that have not been logged yet; `stream` is the main process's, and so is `spared`, the step
    of one that is not removed. Nobody goes on before the checkpoint is there.
    """
    target = path_of(directory, step)
    partial = directory / f".{target.name}.partial"
    accelerator = engine.accelerator
    if accelerator.is_main_process:
        for leftover in directory.glob(f".{PREFIX}*"):  # of a process that was killed
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    engine.save(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if stream is not None:
            torch.save(stream, partial / "stream.pt")
        told = {
            "step": step,
            "metrics": metrics or {},
            "engine": engine.name,
            "processes": accelerator.num_processes,
        }
        (partial / "state.json").write_text(json.dumps(told) + "\n")
        replace_directory(partial, target)
        spare = None if spared is None else path_of(directory, spared)
        for path in list_checkpoints(directory)[:-keep]:
            if path != spare:  # never half of one under its name
                shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")))
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(path: Path, engine: Engine) -> Saved:
    """Put a checkpoint back; what it tells. Every rank calls it.

    Raises UserError for one that cannot be read, or that another engine wrote.
    """
    try:
        told = json.loads((path / "state.json").read_text())
        _refuse_other_engine(path, told, engine)
        engine.load(path)
        stream = path / "stream.pt"
        return Saved(
            step=int(told["step"]),
            metrics=told["metrics"],
            stream=torch.load(stream, weights_only=True, map_location="cpu") if stream.is_file() else None,
        )
    except UserError:
        raise
    except Exception as error:  # a damaged file can fail in any reader
        raise UserError(
            f"checkpoint {path} cannot be resumed ({' '.join(str(error).split())[:200]}); "
            "delete it to go on from the one before, or pass --fresh"
        ) from error


def _refuse_other_engine(path: Path, told: dict[str, Any], engine: Engine) -> None:
    """What an engine writes only the same one reads, and some only on as many processes."""
    theirs = (told["engine"], told["processes"] if engine.is_bound_to_processes else None)
    ours = (engine.name, engine.accelerator.num_processes if engine.is_bound_to_processes else None)
    if theirs != ours:
        raise UserError(
            f"checkpoint {path} was written by engine '{told['engine']}' on {told['processes']} process(es) and this "
            f"is '{engine.name}' on {engine.accelerator.num_processes}; launch it as before, or pass --fresh"
        )


def path_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"{PREFIX}{step:08d}"


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
