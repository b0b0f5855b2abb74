"""Where a run's numbers go: the terminal, OUTPUT_DIR/log.jsonl and, if asked, Weights & Biases."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from layerskip_model.errors import UserError
from train.config import LogConfig

LOG_NAME = "log.jsonl"
PLAIN_INTERVAL = 10.0  # seconds between lines where there is no terminal to draw a bar on


class RunLog:
    """The main process's log of one run; on other processes every call does nothing."""

    def __init__(self, directory: Path, config: LogConfig, recipe: dict[str, Any], *, active: bool) -> None:
        self.active = active
        self.path = directory / LOG_NAME
        self.console = Console(stderr=True, quiet=not active)
        self.wandb = _start_wandb(directory, config, recipe) if active and config.wandb else None

    def forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run will do again."""
        if not self.active or not self.path.exists():
            return
        # A killed run may have left half a line at the end.
        lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
        partial = self.path.with_suffix(".partial")
        partial.write_text(kept)
        os.replace(partial, self.path)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One JSON line, after `step` finished steps, and the same to wandb."""
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Finish the wandb run."""
        if self.wandb is not None:
            self.wandb.finish()


class StepProgress:
    """Steps done, loss, tokens a second and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, log: RunLog, start: int, total: int) -> None:
        self.log, self.start, self.total = log, start, total
        self.began = self.last_line = time.monotonic()
        self.tokens = 0
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.bar = Progress(*columns, console=log.console, disable=not (log.active and sys.stderr.isatty()))
        self.task = self.bar.add_task("training", total=total, completed=start, status="")

    def __enter__(self) -> StepProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    @property
    def tokens_per_second(self) -> float:
        """Since the run (or its continuation) began."""
        return self.tokens / max(time.monotonic() - self.began, 1e-9)

    def advance(self, step: int, tokens: int, loss: float | None) -> None:
        """One more step is done; `loss` is the latest known."""
        self.tokens += tokens
        shown = "" if loss is None else f"loss {loss:.3f}  "
        status = f"{shown}{self.tokens_per_second:,.0f} tok/s"
        self.bar.update(self.task, completed=step, status=status)
        now = time.monotonic()
        if self.bar.disable and (now - self.last_line > PLAIN_INTERVAL or step == self.total):
            self.last_line = now
            left = (now - self.began) / (step - self.start) * (self.total - step)
            self.log.say(f"step {step}/{self.total}  {status}  {int(left // 60)}:{int(left % 60):02d} left")


def _start_wandb(directory: Path, config: LogConfig, recipe: dict[str, Any]) -> Any:
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
            mode=mode,
            dir=str(directory),
            config=recipe,
        )
    except wandb.errors.Error as error:  # no account, no network
        raise UserError(
            f"log.wandb: {' '.join(str(error).split()).rstrip('.')}; run 'wandb login', or set mode: offline"
        ) from error
