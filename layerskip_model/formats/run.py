"""`run.json`, which a training run leaves beside what it exported: the handoff to every other program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerskip_model.errors import UserError

RUN_FILE = "run.json"


def read_run(directory: str | Path) -> dict[str, Any]:
    """A run's run.json. Raises UserError where there is no finished run."""
    path = Path(directory) / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"run '{directory}' is no finished training run: it has no {RUN_FILE}; name a run's output_dir"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"run '{directory}': {RUN_FILE} is damaged ({error}); train again") from None
    if not _is_run(content):
        wanted = "base, heldout, recipe, suggested.strategy and suggested.settings"
        raise UserError(f"run '{directory}': {RUN_FILE} is damaged (it needs {wanted}); train again")
    return content


def model_of(directory: Path, content: dict[str, Any]) -> Path:
    """The checkpoint to decode with: what the run exported, or the model that it trained heads for."""
    exported = directory / content["base"]
    return exported if exported.is_dir() else Path(content["base"])


def heads_of(directory: Path, content: dict[str, Any]) -> Path | None:
    """The heads that it exported, if it trained some."""
    name = content.get("heads")
    return None if name is None else directory / name


def _is_run(content: Any) -> bool:
    """Whether run.json has what is read from it."""
    if not isinstance(content, dict):
        return False
    suggested = content.get("suggested")
    names = all(isinstance(content.get(key), str) for key in ("base", "heldout", "recipe"))
    if not names or not isinstance(suggested, dict):
        return False
    return isinstance(suggested.get("strategy"), str) and isinstance(suggested.get("settings"), dict)
