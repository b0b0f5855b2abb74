"""The training loop. It says when; the objective says how."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerskip_model.errors import UserError
from train.best import find_best, is_choosing, is_measured, put_best_back, remember
from train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from train.config import Recipe
from train.data.stream_rows import StreamState
from train.data.streams import SourceLost
from train.drafting import decode, gain_in_words, suggest
from train.evaluation import evaluate, to_device
from train.features import add_features
from train.metrics import MetricSums, all_sum
from train.model import export_dtype
from train.objectives.base import Batch
from train.optimizer import set_learning_rate
from train.processes import join, on_main_process
from train.progress import StepProgress, progress_of
from train.run import Run, set_up
from train.run_directory import (
    CHECKPOINTS_NAME,
    EXPORT_NAME,
    HELDOUT_NAME,
    RUN_NAME,
    claim,
    write_export,
    write_run_file,
)
from train.stop import Interrupted, StopRequest


def train(recipe: Recipe[Any], *, fresh: bool = False) -> Path:
    """Train a recipe, or go on with it where an earlier call was interrupted; its output directory.

    Raises UserError for what the user can mend and Interrupted when it was asked to stop; run again, it
    continues exactly as if it had never stopped.
    """
    state = join()
    directory = Path(recipe.output_dir)
    on_main_process(state, lambda: claim(directory, recipe, fresh=fresh))
    if (directory / RUN_NAME).is_file():
        if state.is_main_process:
            print(f"{directory} is finished; pass --fresh to train it again", file=sys.stderr)
        return directory
    run = set_up(recipe, directory, state)
    try:
        add_features(run)
        fit(run)
        finish(run)
    finally:
        run.log.close()
    return directory


def fit(run: Run) -> None:
    """All optimizer steps from the newest checkpoint on."""
    recipe, total = run.recipe, run.recipe.total_steps
    sums = MetricSums()
    start, stream = resume(run, sums)
    stop = StopRequest()
    batches = run.data.batches(
        run.training_rows,
        sequences=recipe.batch.sequences,
        micro=run.micro,
        seed=recipe.seed,
        start=start,
        stop=total,
        rank=run.accelerator.process_index,
        world=run.accelerator.num_processes,
        state=stream,
        is_stopping=lambda: stop.requested,
    )
    done = start
    with progress_of(run, start) as progress, stop:
        try:
            for step, micro in zip(range(start, total), batches, strict=True):
                stopping = train_step(run, step, micro, sums, stop.requested)
                done = step + 1
                last = done == total
                progress.count(recipe.batch.sequences * recipe.batch.length)
                if due(recipe.log.every, done) or last:
                    log_step(run, done, sums, progress)
                progress.advance(done)
                with progress.paused():
                    heldout: dict[str, float] = {}
                    if is_evaluated(recipe, done):
                        heldout = evaluate(run, done)
                        run.log.write(done, heldout)
                    saving = is_kept(recipe, done)
                    if saving or stopping:
                        checkpoint(run, done, sums, batches.state())
                    if saving:  # after the checkpoint: whatever goes wrong in a decode, no steps are lost
                        measure(run, done, heldout)
                if stopping and not last:
                    raise interruption(done, total)
        except SourceLost:  # on every rank, before the step that lacks data
            if done > start:
                checkpoint(run, done, sums, batches.state())
            if stop.requested:
                raise interruption(done, total) from None
            raise


def interruption(done: int, total: int) -> Interrupted:
    """What ends a run that was asked to stop."""
    return Interrupted(f"stopped after step {done} of {total}; run the same command to go on")


def resume(run: Run, sums: MetricSums) -> tuple[int, StreamState | None]:
    """Put the newest checkpoint back, if there is one; the number of finished steps and where streams were."""
    saved = list_checkpoints(run.directory / CHECKPOINTS_NAME)
    start, stream = 0, None
    if saved:
        start, metrics, stream = load_checkpoint(saved[-1], run.engine)
        sums.restore(metrics, run.accelerator)
        run.log.say(f"going on after step {start}")
    run.log.forget_after(start)
    if start and is_kept(run.recipe, start) and is_choosing(run) and not is_measured(run, start):
        measure(run, start, {})  # the run ended between the checkpoint and that
    return start, stream


def train_step(run: Run, step: int, micro: list[Batch], sums: MetricSums, stop_requested: bool) -> bool:
    """One optimizer step over the global batch; whether any rank wants to stop."""
    recipe, accelerator = run.recipe, run.accelerator
    # 1. How many tokens count in each term, over the whole global batch.
    counts = [run.objective.count(batch) for batch in micro]
    names = sorted(counts[0])
    local = [float(sum(count[name] for count in counts)) for name in names]
    *totals, stops = all_sum(accelerator, [*local, float(stop_requested)])
    denominators = {name: max(total, 1.0) for name, total in zip(names, totals, strict=True)}
    # 2. Everything that changes over time is a function of the step.
    set_learning_rate(run.optimizer, recipe.schedule.factor(step, recipe.total_steps))
    torch.manual_seed(generator_seed(recipe.seed, step, accelerator.process_index))
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
                limit = recipe.optimizer.clip_norm or math.inf
                norm = run.engine.clip(limit)
                if norm is not None:  # not every engine knows it
                    sums.add({"gradient_norm": (norm, 1.0)})
            run.optimizer.step()
            run.optimizer.zero_grad()
    return stops > 0


def generator_seed(seed: int, step: int, rank: int) -> int:
    """For torch's generator, so that what a method draws from it is the same after a resume."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def log_step(run: Run, done: int, sums: MetricSums, progress: StepProgress) -> None:
    """Write and show the means since the last call. Raises UserError when the loss is no number any more."""
    metrics = sums.reduce(run.accelerator)
    refuse_divergence(run, done, metrics)
    metrics["learning_rate"] = run.optimizer.param_groups[0]["lr"]
    metrics |= progress.measure(done)
    run.log.write(done, metrics)
    progress.report(metrics, run.objective.in_words(done - 1, metrics))


def refuse_divergence(run: Run, done: int, metrics: dict[str, float]) -> None:
    """Raise UserError where the loss or the gradient is not finite."""
    for name in ("loss", "gradient_norm"):
        value = metrics.get(name, 0.0)
        if not math.isfinite(value):
            saved = list_checkpoints(run.directory / CHECKPOINTS_NAME)
            raise UserError(
                f"the {name.replace('_', ' ')} is {value} by step {done}; lower optimizer.lr or lengthen "
                f"schedule.warmup_steps (newest checkpoint: {saved[-1].name if saved else 'none'})"
            )


def checkpoint(run: Run, done: int, sums: MetricSums, stream: StreamState | None) -> None:
    """Save; nobody goes on before it is there. Weights that diverged are not saved."""
    totals = sums.totals(run.accelerator)
    refuse_divergence(run, done, {name: total for name, (total, _) in totals.items()})
    directory, keep = run.directory / CHECKPOINTS_NAME, run.recipe.checkpoint.keep
    best = find_best(run) if is_choosing(run) else None
    spared = None if best is None else best.step
    saved = save_checkpoint(directory, done, run.engine, keep, totals, stream, spared)
    run.log.say_once(f"checkpoints in {directory}, {megabytes(saved)} each")


def measure(run: Run, done: int, heldout: dict[str, float]) -> None:
    """Decode with a checkpoint that has just been saved, and keep how it drafts where the best one is exported.

    `heldout` are its metrics on held-out data, if they are known.
    """
    decoded = decode(run, done)
    if is_choosing(run):
        heldout = heldout or evaluate(run, done)
        remember(run, done, decoded, heldout)
        if not is_evaluated(run.recipe, done):  # else they have been logged, before the checkpoint
            run.log.write(done, heldout)
    run.log.write(done, decoded)


def finish(run: Run) -> None:
    """Export, with the metrics of what is exported, and write run.json last: it marks the run as finished."""
    steps = run.recipe.total_steps
    best = put_best_back(run)
    heldout = evaluate(run, steps) if best is None else best.measured.heldout
    plain = {name.removeprefix("heldout/"): value for name, value in heldout.items()}
    suggestion = suggest(run, plain)
    state = run.engine.whole_state()
    if state is not None:

        def write(path: Path) -> None:
            run.objective.export(path, state, export_dtype(run.recipe.model), plain)
            run.data.tokenizer.save_pretrained(path)

        write_export(run.directory, write)
        shutil.copyfile(run.data.heldout_prompts, run.directory / HELDOUT_NAME)
        if best is None:
            run.log.write(steps, heldout)
        write_run_file(
            run.directory,
            run.recipe,
            suggestion=suggestion,
            heldout=plain,
            progress={
                "steps": steps,
                "tokens": steps * run.recipe.batch.sequences * run.recipe.batch.length,
                "engine": run.engine.name,
                "processes": run.accelerator.num_processes,
            },
            heads=run.objective.exported_heads(),
            best=None if best is None else best.told(),
        )
        place, gain = run.directory / EXPORT_NAME, gain_in_words(suggestion)
        run.log.say(f"exported to {place}, {megabytes(place)}{gain}")
    run.accelerator.wait_for_everyone()


def megabytes(directory: Path) -> str:
    """The size of all files in a directory."""
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return f"{size / 1e6:,.1f} MB"


def is_evaluated(recipe: Recipe[Any], done: int) -> bool:
    """Whether the recipe asks for held-out metrics after so many steps; the last ones come with the export."""
    return due(recipe.evaluate.every, done) and done != recipe.total_steps


def is_kept(recipe: Recipe[Any], done: int) -> bool:
    """Whether the recipe asks for a checkpoint after so many steps."""
    return due(recipe.checkpoint.every, done) or done == recipe.total_steps


def due(every: int | None, done: int) -> bool:
    """Whether something that happens every so many steps happens now."""
    return every is not None and done % every == 0
