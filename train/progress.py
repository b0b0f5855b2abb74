"""How far a run is and how fast it goes: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from train.flops import peak_flops
from train.log import RunLog
from train.run import Run

PLAIN_INTERVAL = 10.0  # seconds between lines where there is no terminal to draw a bar on
QUIET_SECONDS = 2.0  # shorter work beside the training shows no bar

Item = TypeVar("Item")


class Bars(Progress):
    """rich's bars, and below them one line of details, cut to the terminal's width."""

    details = ""

    def __init__(self, console: Console, *, disable: bool, transient: bool = False) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # what the others leave
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        super().__init__(*columns, console=console, disable=disable, transient=transient, expand=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.details:
            yield Text(self.details, style="dim", no_wrap=True, overflow="ellipsis")


class StepProgress:
    """Optimizer steps done, the last metrics, the speed and the time left.

    `step_flops` gives the model FLOPs of a step over the global batch (None where that is not known), `peak_flops`
    is what all devices together could do in a second.
    """

    def __init__(
        self,
        log: RunLog,
        start: int,
        total: int,
        *,
        device: torch.device | None = None,
        step_flops: Callable[[int], float | None] = lambda step: None,
        peak_flops: float | None = None,
    ) -> None:
        self.log, self.start, self.total = log, start, total
        self.device = device or torch.device("cpu")
        self.step_flops, self.peak_flops = step_flops, peak_flops
        self.began = self.last_line = self._since = time.monotonic()
        self._measured, self._tokens, self._paused = start, 0, 0.0
        self._status = self._details = ""
        self.bars = Bars(log.console, disable=not log.on_terminal)
        self.task = self.bars.add_task("training", total=total, completed=start, status="")

    def __enter__(self) -> StepProgress:
        self.bars.start()
        self.log.bars = self.bars
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()
        self.log.bars = None

    def count(self, tokens: int) -> None:
        """A step over so many tokens is done."""
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile (evaluation, a checkpoint) is not counted in the speed of training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began

    def measure(self, step: int) -> dict[str, float]:
        """Speed of training since the last call, after `step` steps, and what else the machine has to tell.

        tokens_per_second, over all ranks; mfu, the share of peak_flops that was made use of, recomputation not
        counted; peak_memory_bytes of this process since it began (on CUDA of its tensors); seconds_left.
        """
        now = time.monotonic()
        seconds = max(now - self._since - self._paused, 1e-9)
        metrics = {"tokens_per_second": self._tokens / seconds}
        if self.peak_flops is not None:
            flops = [self.step_flops(done) for done in range(self._measured, step)]
            known = [value for value in flops if value is not None]
            if len(known) == len(flops):
                metrics["mfu"] = sum(known) / seconds / self.peak_flops
        metrics["peak_memory_bytes"] = float(peak_memory(self.device))
        metrics["seconds_left"] = self._seconds_left(step, now)
        self._since, self._measured, self._tokens, self._paused = now, step, 0, 0.0
        return metrics

    def report(self, metrics: dict[str, float], words: str) -> None:
        """Show these metrics from now on; `words` are the method's part."""
        self._status = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s"
        numbers = [f"lr {metrics['learning_rate']:.2g}"]
        if "gradient_norm" in metrics:
            numbers.append(f"grad {metrics['gradient_norm']:.2g}")
        if "mfu" in metrics:
            numbers.append(f"{metrics['mfu']:.0%} MFU")
        numbers.append(f"{metrics['peak_memory_bytes'] / 1e9:.2g} GB")
        self._details = "  ".join([*numbers, words] if words else numbers)

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""
        self.bars.details = self._details
        self.bars.update(self.task, completed=step, status=self._status)
        now = time.monotonic()
        if self.bars.disable and (now - self.last_line > PLAIN_INTERVAL or step == self.total):
            self.last_line = now
            left = int(self._seconds_left(step, now))
            shown = [
                f"step {step}/{self.total}",
                self._status,
                f"{left // 60}:{left % 60:02d} left",
                self._details,
            ]
            self.log.say("  ".join(part for part in shown if part))

    def _seconds_left(self, step: int, now: float) -> float:
        """At the pace of the whole run, or its continuation, evaluation and checkpoints included."""
        return (now - self.began) / max(step - self.start, 1) * (self.total - step)


def progress_of(run: Run, start: int) -> StepProgress:
    """The progress of a run that goes on after `start` steps."""
    batch, accelerator = run.recipe.batch, run.accelerator
    tflops = run.recipe.log.peak_tflops
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    peak = peak_flops(accelerator.device, dtype) if tflops is None else tflops * 1e12
    return StepProgress(
        run.log,
        start,
        run.recipe.total_steps,
        device=accelerator.device,
        step_flops=lambda step: run.objective.step_flops(step, batch.sequences, batch.length),
        peak_flops=None if peak is None else peak * accelerator.num_processes,
    )


def track(log: RunLog, label: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    """Go through `items`, and show how far that is once it takes more than a few seconds."""
    own = Bars(log.console, disable=not log.on_terminal, transient=True)
    bars = log.bars or own
    task = bars.add_task(label, total=total, status="", visible=False)
    began = last_line = time.monotonic()
    try:
        for number, item in enumerate(items, start=1):
            yield item
            bars.advance(task)
            now = time.monotonic()
            if log.on_terminal and not bars.tasks[-1].visible and now - began > QUIET_SECONDS:
                bars.start()
                bars.update(task, visible=True, refresh=True)
            elif not log.on_terminal and now - last_line > PLAIN_INTERVAL:
                last_line = now
                log.say(f"{label} {number}/{total}")
    finally:
        bars.remove_task(task)
        own.stop()


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors occupied on a CUDA device, elsewhere that this process occupied, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss (getrusage(2))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
