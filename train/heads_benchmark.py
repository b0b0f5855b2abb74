"""What training heads on a frozen model costs: their steps beside the model's forward alone, timed in turn.

Part of `python -m train.benchmark`, for recipes whose objective leaves the language model as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console

from eval.clock import now
from eval.statistics import Estimate, bootstrap_interval
from layerskip_model.errors import UserError
from train.config import Recipe
from train.evaluation import to_device
from train.heads_memory import HeadMemory, memory_in_words, memory_of_head
from train.loop import train_step
from train.metrics import MetricSums
from train.objectives.base import Batch
from train.objectives.drafting import DraftingObjective
from train.processes import join
from train.run import Run, set_up

WARM_UP = 3  # rounds that are not timed


@dataclass(frozen=True)
class HeadsReport:
    """Seconds of each timed round, and what the products of matrices predict.

    Attributes:
        forward: of the frozen model's forward to its last hidden state, over the global batch.
        step: of a whole optimizer step of the heads, that forward in it.
        update: of that, clipping and the optimizer's step.
        ratio: median over rounds of step / forward, with a 95 % interval.
        flops_ratio: the same by matrix products, which the update has none of.
        predicted: flops_ratio, with the update added as the time it takes.
        over_predicted: median over rounds of step over what is predicted from the forward and the update beside it.
        memory: of an EAGLE-3 head, see `memory_of_head`.
    """

    forward: list[float]
    step: list[float]
    update: list[float]
    ratio: Estimate
    flops_ratio: float
    predicted: float
    over_predicted: Estimate
    memory: list[HeadMemory]


def time_heads(recipe: Recipe[Any], directory: Path, rounds: int) -> tuple[HeadsReport, Run]:
    """Measure. Raises UserError for a launch of several processes."""
    if join().num_processes > 1:
        raise UserError("the benchmark of training times one process; start it without a launcher")
    total = WARM_UP + rounds
    recipe = recipe.model_copy(update={"max_steps": total, "max_tokens": None, "epochs": None})
    recipe = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"warmup_steps": 0})})
    run = set_up(recipe, directory, join())
    batches = run.data.batches(
        run.training_rows,
        sequences=recipe.batch.sequences,
        micro=run.micro,
        seed=recipe.seed,
        start=0,
        stop=total,
    )
    sums = MetricSums()
    forward: list[float] = []
    step: list[float] = []
    update: list[float] = []
    with timed_updates(run, update):
        for number, micro in enumerate(batches):
            order = (forward_seconds, step_seconds) if number % 2 else (step_seconds, forward_seconds)
            seconds = {work: work(run, number, micro, sums) for work in order}
            forward.append(seconds[forward_seconds])
            step.append(seconds[step_seconds])
    timed = slice(WARM_UP, None)
    return report(run, micro, forward[timed], step[timed], update[timed]), run


def forward_seconds(run: Run, number: int, micro: list[Batch], sums: MetricSums) -> float:
    """Of the frozen model alone over all micro-batches."""
    backbone = heads_of(run).module.backbone
    begin = now(run.accelerator.device)
    for batch in micro:
        moved = to_device(batch, run.accelerator.device)
        with torch.no_grad(), run.accelerator.autocast():
            backbone.final_states(moved["input_ids"], moved.get("position_ids"))
    return now(run.accelerator.device) - begin


def step_seconds(run: Run, number: int, micro: list[Batch], sums: MetricSums) -> float:
    """Of an optimizer step, as the training loop does it."""
    begin = now(run.accelerator.device)
    train_step(run, number, micro, sums, stop_requested=False)
    return now(run.accelerator.device) - begin


@contextmanager
def timed_updates(run: Run, seconds: list[float]) -> Iterator[None]:
    """While it lasts, the seconds from clipping to the end of each update go to a list."""
    engine: Any = run.engine
    optimizer: Any = run.optimizer
    clip, step, begins = engine.clip, optimizer.step, []

    def noted_clip(limit: float) -> Any:
        begins.append(now(run.accelerator.device))
        return clip(limit)

    def noted_step() -> None:
        step()
        if begins:  # not before the last micro-batch
            seconds.append(now(run.accelerator.device) - begins.pop())

    engine.clip, optimizer.step = noted_clip, noted_step
    try:
        yield
    finally:
        del engine.clip, optimizer.step


def heads_of(run: Run) -> DraftingObjective[Any]:
    """The objective. Raises UserError for one that this cannot time."""
    if not isinstance(run.objective, DraftingObjective):
        raise UserError(f"objective.kind: {run.recipe.objective.kind} cannot be timed beside a frozen model")
    return run.objective


def report(
    run: Run, micro: list[Batch], forward: list[float], step: list[float], update: list[float]
) -> HeadsReport:
    """The ratios; `micro` is the last step's batch, whose labels count as those of all."""
    objective, batch = heads_of(run), run.recipe.batch
    counts: dict[str, int] = {}
    for part in micro:
        for term, count in objective.count(part).items():
            counts[term] = counts.get(term, 0) + count
    alone = objective.flops_of({}, batch.sequences, batch.length)
    flops_ratio = objective.flops_of(counts, batch.sequences, batch.length) / alone

    def ratio(steps: Any, forwards: Any) -> Any:
        return np.median(steps / forwards, axis=-1)

    def over_predicted(steps: Any, forwards: Any, updates: Any) -> Any:
        return np.median(steps / (forwards * flops_ratio + updates), axis=-1)

    return HeadsReport(
        forward=forward,
        step=step,
        update=update,
        ratio=bootstrap_interval(ratio, step, forward),
        flops_ratio=flops_ratio,
        predicted=flops_ratio + median(update) / median(forward),
        over_predicted=bootstrap_interval(over_predicted, step, forward, update),
        memory=memory_of_head(run, micro[0]),
    )


def show_heads(found: HeadsReport, run: Run) -> None:
    """Print it."""
    console, ratio, over = Console(highlight=False), found.ratio, found.over_predicted
    console.print(
        f"a step of the heads {1e3 * median(found.step):.1f} ms, the frozen forward alone "
        f"{1e3 * median(found.forward):.1f} ms, the update {1e3 * median(found.update):.1f} ms\n"
        f"step over forward {ratio.value:.3f} ({ratio.low:.3f}, {ratio.high:.3f}), by FLOPs {found.flops_ratio:.3f}, "
        f"with the update's time {found.predicted:.3f}\n"
        f"step over what that predicts {over.value:.3f} ({over.low:.3f}, {over.high:.3f})",
        soft_wrap=True,
    )
    backbone = heads_of(run).module.backbone
    for line in memory_in_words(found.memory, backbone.hidden_size, backbone.vocab_size):
        console.print(line, soft_wrap=True)
