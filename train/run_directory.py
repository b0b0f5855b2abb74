"""What a run leaves in its output directory, and whose directory it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from eval.environment import command_line, git_revision, versions
from layerskip_model.errors import UserError
from train.checkpoint import replace_directory
from train.config import Recipe
from train.log import LOG_NAME

RECIPE_NAME = "recipe.yaml"
RUN_NAME = "run.json"
EXPORT_NAME = "export"
HELDOUT_NAME = "heldout.jsonl"
DATA_NAME = "data"
CHECKPOINTS_NAME = "checkpoints"
OURS = (RECIPE_NAME, RUN_NAME, EXPORT_NAME, HELDOUT_NAME, DATA_NAME, CHECKPOINTS_NAME, LOG_NAME, "wandb")
FREE_TO_CHANGE = {"output_dir", "log", "checkpoint", "evaluate"}  # none of them changes what is learnt


def claim(directory: Path, recipe: Recipe[Any], *, fresh: bool) -> None:
    """Make the output directory this recipe's: new, or with an earlier run of the same recipe in it.

    `fresh` deletes what an earlier run left (and nothing else). Raises UserError where another recipe's run
    lies there, naming the first key that differs.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output_dir: {directory} is a file; name a directory")
    if fresh:
        for name in OURS:
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    ours = recipe.model_dump(mode="json")
    path = directory / RECIPE_NAME
    if path.is_file():
        difference = _first_difference(yaml.safe_load(path.read_text()), ours)
        if difference:
            raise UserError(
                f"output_dir: {directory} holds a run of another recipe ({difference}); "
                "choose another output_dir, or pass --fresh to delete that run"
            )
    elif any((directory / name).exists() for name in (EXPORT_NAME, CHECKPOINTS_NAME, RUN_NAME)):
        raise UserError(
            f"output_dir: {directory} holds results without a {RECIPE_NAME}; choose another output_dir"
        )
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{RECIPE_NAME}.partial"
    partial.write_text(yaml.safe_dump(ours, sort_keys=False))
    partial.replace(path)


def write_export(directory: Path, write: Any) -> Path:
    """`write(path)` into a directory aside, then rename it to the run's export."""
    target = directory / EXPORT_NAME
    partial = directory / f".{EXPORT_NAME}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write(partial)
    replace_directory(partial, target)
    return target


def write_run_file(
    directory: Path,
    recipe: Recipe[Any],
    *,
    suggestion: dict[str, Any],
    heldout: dict[str, float],
    progress: dict[str, float],
) -> None:
    """run.json, the handoff to evaluation: `python -m eval benchmark --run DIR` needs nothing else."""
    export = directory / EXPORT_NAME
    content = {
        "format": 1,
        "kind": recipe.objective.kind,
        "base": EXPORT_NAME,
        "heads": None,
        "fingerprint": fingerprint(export),
        "heldout": HELDOUT_NAME,
        "suggested": suggestion,
        "training": progress,
        "heldout_metrics": heldout,
        "recipe": RECIPE_NAME,
        "command": command_line(),
        "versions": versions(),
        "revision": git_revision(),
    }
    partial = directory / f".{RUN_NAME}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(directory / RUN_NAME)


def fingerprint(checkpoint: Path) -> str:
    """SHA-256 over a checkpoint's weight files: which model exactly this is."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    flat_theirs, flat_ours = _flat(theirs), _flat(ours)
    for key in sorted(flat_theirs | flat_ours):
        if key.split(".")[0] not in FREE_TO_CHANGE and flat_theirs.get(key) != flat_ours.get(key):
            return f"{key}: {flat_theirs.get(key)} there, {flat_ours.get(key)} here"
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".lstrip(".")).items()
    }
