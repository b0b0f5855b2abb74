"""Where a run's numbers go: the terminal, OUTPUT_DIR/log.jsonl and, if asked, Weights & Biases."""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from layerskip_model.errors import UserError
from train.config import LogConfig

if TYPE_CHECKING:
    from train.progress import Bars

LOG_NAME = "log.jsonl"


class RunLog:
    """The main process's log of one run; on other processes every call does nothing."""

    def __init__(self, directory: Path, config: LogConfig, recipe: dict[str, Any], *, active: bool) -> None:
        self.active = active
        self.path = directory / LOG_NAME
        self.console = Console(stderr=True, quiet=not active)
        self.on_terminal = active and sys.stderr.isatty()
        self.bars: Bars | None = None  # what is on the terminal now
        self.wandb = _start_wandb(directory, config, recipe) if active and config.wandb else None
        self._in_wandb: set[tuple[int, str]] = set()  # (step, metric) that an earlier process has sent there
        self._said: set[str] = set()

    def forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run will do again; wandb, which cannot, will not get them twice."""
        if not self.active or not self.path.exists():
            return
        # A killed run may have left half a line at the end.
        lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
        if self.wandb is not None:
            self._in_wandb = {(line["step"], name) for line in lines for name in line}
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
        partial = self.path.with_suffix(".partial")
        partial.write_text(kept)
        os.replace(partial, self.path)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One JSON line, after `step` finished steps, and the same to wandb; no line without metrics."""
        if not self.active or not metrics:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.wandb is not None:
            new = {name: value for name, value in metrics.items() if (step, name) not in self._in_wandb}
            if new:
                self.wandb.log(new, step=step)

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say_once(self, text: str) -> None:
        """The same, unless it has been said."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def close(self) -> None:
        """Finish the wandb run."""
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(directory: Path, config: LogConfig, recipe: dict[str, Any]) -> Any:
    """The run at Weights & Biases, the same one whenever the run in `directory` goes on."""
    assert config.wandb is not None
    try:
        import wandb
    except ImportError:
        raise UserError(
            "log.wandb needs the wandb package: pip install wandb, or remove the section"
        ) from None
    settings = config.wandb
    # wandb itself reads the environment only once a process.
    mode: Any = settings.mode or os.environ.get("WANDB_MODE") or "online"
    try:
        return wandb.init(
            project=settings.project,
            name=settings.name,
            id=_wandb_id(directory / "wandb"),
            resume="allow",
            mode=mode,
            dir=str(directory),
            config=recipe,
        )
    except wandb.errors.Error as error:  # no account, no network
        raise UserError(
            f"log.wandb: {' '.join(str(error).split()).rstrip('.')}; run 'wandb login', or set mode: offline"
        ) from error


def _wandb_id(directory: Path) -> str:
    """The id of the run, made up once and kept in wandb's own folder, which goes with the run."""
    path = directory / "run-id"
    if not path.is_file():
        directory.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(secrets.token_hex(8))
        partial.replace(path)
    return path.read_text()
