"""The training loop. It says when; the objective says how."""

from __future__ import annotations

import math
import shutil
import signal
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn

from layerskip_model.errors import UserError
from train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from train.config import Recipe
from train.data.packing import PackedDataset, StepBatches, evaluation_batches
from train.data.prepare import PreparedData, prepare
from train.log import RunLog, StepProgress
from train.metrics import MetricSums, all_sum
from train.model import build_model, mixed_precision, tokenizer_config
from train.objectives import OBJECTIVES
from train.objectives.base import Batch, Objective
from train.optimizer import build_optimizer, set_learning_rate
from train.run_directory import (
    CHECKPOINTS_NAME,
    DATA_NAME,
    EXPORT_NAME,
    HELDOUT_NAME,
    RUN_NAME,
    claim,
    write_export,
    write_run_file,
)


class Interrupted(Exception):
    """The run was asked to stop (SIGINT or SIGTERM) and has saved a checkpoint."""


@dataclass
class Run:
    """Everything that one run works with."""

    recipe: Recipe[Any]
    directory: Path
    accelerator: Accelerator
    objective: Objective[Any]
    module: nn.Module  # the objective as the engine wraps it
    optimizer: Any
    data: PreparedData
    log: RunLog


def train(recipe: Recipe[Any], *, fresh: bool = False) -> Path:
    """Train a recipe, or go on with it where an earlier call was interrupted; its output directory.

    Raises UserError for what the user can mend and Interrupted when it was asked to stop; run again, it
    continues exactly as if it had never stopped.
    """
    state = PartialState()
    directory = Path(recipe.output_dir)
    if state.is_main_process:
        claim(directory, recipe, fresh=fresh)
    state.wait_for_everyone()
    if (directory / RUN_NAME).is_file():
        if state.is_main_process:
            print(f"{directory} is finished; pass --fresh to train it again", file=sys.stderr)
        return directory
    run = set_up(recipe, directory)
    try:
        fit(run)
        finish(run)
    finally:
        run.log.close()
    return directory


def set_up(recipe: Recipe[Any], directory: Path) -> Run:
    """Data, model, objective and optimizer, prepared for the engine that the process was launched with."""
    state = PartialState()
    log = RunLog(directory, recipe.log, recipe.model_dump(mode="json"), active=state.is_main_process)
    data = prepare(recipe.data, tokenizer_config(recipe.model), directory / DATA_NAME, state)
    recipe = recipe.with_total_steps(len(PackedDataset(data.train, recipe.batch.length)))
    accelerator = Accelerator(
        mixed_precision=mixed_precision(recipe.model),
        gradient_accumulation_steps=micro_batches(recipe, state.num_processes),
    )
    model = build_model(recipe.model, data.tokenizer, recipe.batch.length, recipe.seed)
    objective = OBJECTIVES[recipe.objective.kind].build(recipe, model)
    optimizer = build_optimizer(recipe.optimizer, objective)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    log.say(
        f"{trained:,} parameters train, {data.train.tokens:,} tokens, {recipe.total_steps:,} steps of "
        f"{recipe.batch.sequences} x {recipe.batch.length}, {state.num_processes} process(es), "
        f"{accelerator.mixed_precision} autocast on {accelerator.device}"
    )
    module, optimizer = accelerator.prepare(objective, optimizer)
    return Run(recipe, directory, accelerator, objective, module, optimizer, data, log)


def micro_batches(recipe: Recipe[Any], ranks: int) -> int:
    """Forwards an optimizer step on each rank."""
    per_rank = -(-recipe.batch.sequences // ranks)
    return -(-per_rank // min(recipe.batch.micro or per_rank, per_rank))


def fit(run: Run) -> None:
    """All optimizer steps from the newest checkpoint on."""
    recipe, checkpoints = run.recipe, run.directory / CHECKPOINTS_NAME
    saved = list_checkpoints(checkpoints)
    start = load_checkpoint(saved[-1], run.objective, run.optimizer) if saved else 0
    run.log.forget_after(start)
    if start:
        run.log.say(f"going on after step {start}")
    batches = StepBatches(
        PackedDataset(run.data.train, recipe.batch.length),
        sequences=recipe.batch.sequences,
        micro=recipe.batch.micro or recipe.batch.sequences,
        seed=recipe.seed,
        rank=run.accelerator.process_index,
        world=run.accelerator.num_processes,
        start=start,
        stop=recipe.total_steps,
    )
    sums = MetricSums()
    loss: float | None = None
    with StepProgress(run.log, start, recipe.total_steps) as progress, StopRequest() as stop:
        for step, micro in zip(range(start, recipe.total_steps), batches, strict=True):
            tokens, stopping = train_step(run, step, micro, sums, stop.requested)
            done = step + 1
            if done % recipe.log.every == 0 or done == recipe.total_steps:
                loss = log_step(run, done, sums, progress)
            progress.advance(done, tokens, loss)
            if due(recipe.evaluate.every, done) and done < recipe.total_steps:
                run.log.write(done, evaluate(run, done))
            if due(recipe.checkpoint.every, done) or stopping:
                checkpoint(run, done)
            if stopping and done < recipe.total_steps:
                raise Interrupted(
                    f"stopped after step {done} of {recipe.total_steps}; run the same command to go on"
                )


def train_step(
    run: Run, step: int, micro: list[Batch], sums: MetricSums, stop_requested: bool
) -> tuple[int, bool]:
    """One optimizer step over the global batch; its number of tokens, and whether any rank wants to stop."""
    recipe, accelerator = run.recipe, run.accelerator
    # 1. How many tokens count in each term, over the whole global batch.
    counts = [run.objective.count(batch) for batch in micro]
    names = sorted(counts[0])
    local = [float(sum(count[name] for count in counts)) for name in names]
    *totals, stops = all_sum(accelerator, [*local, float(stop_requested)])
    denominators = {name: max(total, 1.0) for name, total in zip(names, totals, strict=True)}
    # 2. Everything that changes over time is a function of the step.
    set_learning_rate(run.optimizer, recipe.schedule.factor(step, recipe.total_steps))
    torch.manual_seed(hash((recipe.seed, step, accelerator.process_index)))
    # 3. Gradients of the mean over the global batch. Engines average over ranks and micro-batches: undo it.
    run.module.train()
    undo_mean = accelerator.num_processes * accelerator.gradient_accumulation_steps
    for batch in micro:
        with accelerator.accumulate(run.module):
            loss, metrics = run.module(to_device(batch, accelerator.device), step, denominators)
            accelerator.backward(loss * undo_mean)
            sums.add(metrics)
            # 4. The update, after the last micro-batch.
            if accelerator.sync_gradients:
                limit = recipe.optimizer.clip_norm or float("inf")
                norm = accelerator.clip_grad_norm_(run.module.parameters(), limit)
                sums.add(
                    {"gradient_norm": (norm, 1.0 / accelerator.num_processes)} if norm is not None else {}
                )
            run.optimizer.step()
            run.optimizer.zero_grad()
    return int(max(totals)), stops > 0


def log_step(run: Run, done: int, sums: MetricSums, progress: StepProgress) -> float:
    """Write the means since the last call; the loss. Raises UserError when it is no number any more."""
    metrics = sums.reduce(run.accelerator)
    loss = metrics["loss"]
    metrics["learning_rate"] = run.optimizer.param_groups[0]["lr"]
    metrics["tokens_per_second"] = progress.tokens_per_second
    run.log.write(done, metrics)
    if loss != loss or loss == float("inf"):
        saved = list_checkpoints(run.directory / CHECKPOINTS_NAME)
        raise UserError(
            f"the loss is {loss} at step {done}; lower optimizer.lr or lengthen schedule.warmup_steps "
            f"(newest checkpoint: {saved[-1].name if saved else 'none'})"
        )
    return loss


@torch.no_grad()
def evaluate(run: Run, done: int) -> dict[str, float]:
    """The objective's metrics on held-out data after `done` steps, named heldout/..., with bits per byte."""
    recipe, accelerator = run.recipe, run.accelerator
    run.module.eval()
    sums = MetricSums()
    dataset = PackedDataset(run.data.heldout, recipe.batch.length, keep_last=True)
    micro = recipe.batch.micro or recipe.batch.sequences
    rank, world = accelerator.process_index, accelerator.num_processes
    wanted = -(-min(recipe.evaluate.sequences or len(dataset), len(dataset)) // (micro * world))
    for batch in islice(evaluation_batches(dataset, micro, rank, world), wanted):
        denominators = dict.fromkeys(run.objective.count(batch), 1.0)
        sums.add(run.module(to_device(batch, accelerator.device), done, denominators)[1])
    metrics = sums.reduce(accelerator)
    heldout = run.data.heldout
    metrics["bits_per_byte"] = metrics["loss"] / math.log(2.0) * (heldout.tokens - 1) / heldout.bytes
    run.log.say(
        f"held out after step {done}: loss {metrics['loss']:.3f}, {metrics['bits_per_byte']:.3f} bits per byte"
    )
    return {f"heldout/{name}": value for name, value in metrics.items()}


def checkpoint(run: Run, done: int) -> None:
    """Save on the main process; nobody goes on before it is there."""
    if run.accelerator.is_main_process:
        directory = run.directory / CHECKPOINTS_NAME
        save_checkpoint(directory, done, run.objective, run.optimizer, run.recipe.checkpoint.keep)
    run.accelerator.wait_for_everyone()


def finish(run: Run) -> None:
    """Evaluate once more, export, and write run.json last: it marks the run as finished."""
    steps = run.recipe.total_steps
    heldout = evaluate(run, steps)
    run.log.write(steps, heldout)
    if run.accelerator.is_main_process:

        def write(path: Path) -> None:
            run.objective.export(path)
            run.data.tokenizer.save_pretrained(path)

        write_export(run.directory, write)
        shutil.copyfile(run.data.heldout_rows, run.directory / HELDOUT_NAME)
        plain = {name.removeprefix("heldout/"): value for name, value in heldout.items()}
        write_run_file(
            run.directory,
            run.recipe,
            suggestion=run.objective.suggestion(plain),
            heldout=plain,
            progress={"steps": steps, "tokens": steps * run.recipe.batch.sequences * run.recipe.batch.length},
        )
        run.log.say(f"exported to {run.directory / EXPORT_NAME}")
    run.accelerator.wait_for_everyone()


def due(every: int | None, done: int) -> bool:
    """Whether something that happens every so many steps happens now."""
    return every is not None and done % every == 0


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors to the device; row indexes become a list, for the host to decide by without waiting for it."""
    return {k: v.tolist() if k == "row" else v.to(device, non_blocking=True) for k, v in batch.items()}


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a wish to stop after the step; a second one kills as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
