"""What a run leaves in its output directory, and whose directory it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from eval.environment import command_line, git_revision, versions
from layerskip_model.errors import UserError
from layerskip_model.formats.fingerprint import checkpoint_directory, fingerprint
from train.checkpoint import replace_directory
from train.config import Recipe
from train.log import LOG_NAME
from train.preflight import check_inputs

RECIPE_NAME = "recipe.yaml"
RUN_NAME = "run.json"
EXPORT_NAME = "export"
HELDOUT_NAME = "heldout.jsonl"
DATA_NAME = "data"
CHECKPOINTS_NAME = "checkpoints"
OURS = (RECIPE_NAME, RUN_NAME, EXPORT_NAME, HELDOUT_NAME, DATA_NAME, CHECKPOINTS_NAME, LOG_NAME, "wandb")
MARK = "# The whole recipe of this run, defaults included; written by python -m train.\n"
# These change nothing that is learnt, or no more than rounding does.
FREE_TO_CHANGE = (
    "output_dir",
    "log",
    "checkpoint",
    "evaluate",
    "batch.micro",
    "data.cache_dir",
    "features.cache",
    "model.activation_checkpointing",
)


def claim(directory: Path, recipe: Recipe[Any], *, fresh: bool) -> None:
    """Make the output directory this recipe's: new, or with an earlier run of the same recipe in it.

    `fresh` deletes what an earlier run left, and nothing else. Raises UserError where another recipe's run
    or somebody's files lie there, and for everything that `check_inputs` refuses; then nothing has changed.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output_dir: {directory} is a file; name a directory")
    if not is_run(directory):
        _refuse_foreign_files(directory)
    elif not fresh:
        _refuse_other_run(directory, recipe)
        if (directory / RUN_NAME).is_file():
            return
    check_inputs(recipe)
    if fresh and is_run(directory):
        _delete_run(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f".{RECIPE_NAME}.partial"
        partial.write_text(MARK + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        partial.replace(directory / RECIPE_NAME)
    except OSError as error:
        raise UserError(f"output_dir: {directory} cannot be written ({error.strerror})") from None


def is_run(directory: Path) -> bool:
    """Whether a run of ours, finished or not, lies in a directory."""
    try:
        with (directory / RECIPE_NAME).open(encoding="utf-8", errors="replace") as file:
            return file.readline() == MARK
    except OSError:
        return False


def _refuse_foreign_files(directory: Path) -> None:
    """A run would write over them, and --fresh delete them."""
    names = [name for name in OURS if (directory / name).exists()]
    if names:
        raise UserError(
            f"output_dir: {directory} holds {', '.join(names)}, but no run; choose another output_dir"
        )


def _refuse_other_run(directory: Path, recipe: Recipe[Any]) -> None:
    try:
        theirs = yaml.safe_load((directory / RECIPE_NAME).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        theirs = None
    if not isinstance(theirs, dict):
        difference: str | None = f"its {RECIPE_NAME} is damaged"
    else:
        difference = _first_difference(theirs, recipe.model_dump(mode="json"))
    if difference:
        raise UserError(
            f"output_dir: {directory} holds a run of another recipe ({difference}); "
            "choose another output_dir, or pass --fresh to delete that run"
        )


def _delete_run(directory: Path) -> None:
    """Everything of a run; its recipe, which says that the rest is ours, last."""
    for name in reversed(OURS):
        for path in (directory / f".{name}.partial", directory / f".{name}.old", directory / name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


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
    progress: dict[str, Any],
    heads: str | None = None,
    best: dict[str, Any] | None = None,
) -> None:
    """run.json, the handoff to evaluation: `python -m eval benchmark --run DIR` needs nothing else.

    `heads` is the folder of the export that holds some; "." is the export itself, and then `base` is the model that
    the recipe names. The fingerprint is that of `base`. `best` says which checkpoint was exported and why, where some
    were compared.
    """
    base = recipe.model.name_or_path if heads == "." else None
    content = {
        "format": 1,
        "kind": recipe.objective.kind,
        "base": base or EXPORT_NAME,
        "heads": None if heads is None else str(Path(EXPORT_NAME) / heads),
        "fingerprint": fingerprint(checkpoint_directory(base) if base else directory / EXPORT_NAME),
        "heldout": HELDOUT_NAME,
        "suggested": suggestion,
        "training": progress,
        "best": best,
        "heldout_metrics": heldout,
        "recipe": RECIPE_NAME,
        "command": command_line(),
        "versions": versions(),
        "revision": git_revision(),
    }
    partial = directory / f".{RUN_NAME}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(directory / RUN_NAME)


def _first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    flat_theirs, flat_ours = _flat(theirs), _flat(ours)
    for key in sorted(flat_theirs | flat_ours):
        is_free = any(f"{key}.".startswith(f"{free}.") for free in FREE_TO_CHANGE)
        if not is_free and flat_theirs.get(key) != flat_ours.get(key):
            return f"{key}: {flat_theirs.get(key)} there, {flat_ours.get(key)} here"
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".lstrip(".")).items()
    }
