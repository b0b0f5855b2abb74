"""What training costs: steps timed in turn in one process, their FLOPs, and their peak memory.

    python -m train.benchmark RECIPE [KEY=VALUE]... [--steps N] [--output_dir DIR]

The recipe gives model, data, batch, precision and optimizer. The objective of one that trains the model is replaced by
each variant of LayerSkip; heads on a frozen model are timed beside its forward alone (heads_benchmark.py). Needs one
process. Times mean something only on a machine that does nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import PreTrainedModel

from eval.clock import now
from eval.command_line import output_directory
from eval.environment import command_line, device_name, git_revision, versions
from eval.statistics import Estimate, bootstrap_interval
from layerskip_model.command_line import run_app
from layerskip_model.early_exit import EarlyExitModel
from layerskip_model.errors import UserError
from train.benchmark_report import show
from train.config import Recipe, load_recipe
from train.flops import model_flops
from train.heads_benchmark import show_heads, time_heads
from train.loop import train_step
from train.memory_benchmark import StepMemory, memory_of_steps
from train.metrics import MetricSums
from train.objectives.base import Batch
from train.objectives.layerskip import EarlyExitConfig, LayerDropoutConfig, LayerSkip, LayerSkipConfig
from train.processes import join
from train.run import Run, set_up
from train.section import FrozenModelSection
from train.trainer_peer import TrainerPeer

PLAIN, TRAINER = "plain", "transformers.Trainer"
WARM_UP = 3  # rounds that are not timed


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant's steps, beside the plain loop's in the same rounds.

    Attributes:
        seconds: of each timed step, the update included.
        ratio: median over rounds of seconds / the plain step's, with a 95 % interval.
        flops_ratio: the same ratio by the matrix products of forward and backward alone.
        predicted: that ratio with the update, which costs the same everywhere, counted as the time it takes.
    """

    name: str
    seconds: list[float]
    ratio: Estimate
    flops_ratio: float
    predicted: float


@dataclass(frozen=True)
class Report:
    """All that `python -m train.benchmark` measured."""

    recipe: dict[str, Any]
    environment: dict[str, Any]
    update_seconds: float  # clipping and optimizer step of the plain loop
    timings: list[Timing]
    memory: list[StepMemory]


def variants(num_layers: int, exits: int) -> dict[str, LayerSkipConfig]:
    """What our own loop does: the method's parts alone and together, each at its p_max. `exits` is R, a fourth of L."""
    loss = EarlyExitConfig(curriculum="rotational", every=exits, e_scale=0.2)
    mild, strong = (LayerDropoutConfig(p_max=p, over_time="constant") for p in (0.1, 0.5))
    return {
        PLAIN: LayerSkipConfig(kind="layerskip"),
        f"exits R={exits}": LayerSkipConfig(kind="layerskip", early_exit=loss),
        f"exits R={exits}, dropout 0.1": LayerSkipConfig(
            kind="layerskip", early_exit=loss, layer_dropout=mild
        ),
        "dropout 0.5": LayerSkipConfig(kind="layerskip", layer_dropout=strong),
    }


class Contestant:
    """One variant with a model of its own, stepped by the training loop."""

    def __init__(self, recipe: Recipe[Any], directory: Path, objective: LayerSkipConfig) -> None:
        self.run = set_up(recipe.model_copy(update={"objective": objective}), directory, join())
        self.module = _module(self.run)
        self.flops = model_flops(self.module.model)
        self.sums = MetricSums()
        self.seconds: list[float] = []

    def step(self, step: int, micro: list[Batch]) -> None:
        """One timed optimizer step."""
        begin = now(self.run.accelerator.device)
        train_step(self.run, step, micro, self.sums, stop_requested=False)
        self.seconds.append(now(self.run.accelerator.device) - begin)

    def step_flops(self, step: int, micro: list[Batch]) -> float:
        """Of the model, in this step."""
        batch = self.run.recipe.batch
        kept = np.full(self.module.backbone.num_layers, batch.sequences)
        if self.module.dropout is not None:
            kept = self.module.dropout.kept(step, range(batch.sequences)).sum(axis=1)
        predicted = sum(self.run.objective.count(part)["tokens"] for part in micro)
        exits = len(self.module.exit_loss.at(step))
        return self.flops.step(kept.tolist(), batch.length, exits, predicted)

    def update_seconds(self, steps: range, batches: list[list[Batch]]) -> float:
        """Median seconds of clipping and the optimizer's step."""
        engine: Any = self.run.engine
        clip, begins, seconds = engine.clip, [], []

        def noted(limit: float) -> Any:
            begins.append(now(self.run.accelerator.device))
            return clip(limit)

        engine.clip = noted
        for step in steps:
            self.step(step, batches[step])
            seconds.append(now(self.run.accelerator.device) - begins[-1])
        del engine.clip
        return median(seconds)


def benchmark(recipe: Recipe[Any], directory: Path, rounds: int) -> Report:
    """Measure everything. Raises UserError for a launch of several processes and for fewer than eight layers."""
    if join().num_processes > 1:
        raise UserError("the benchmark of training times one process; start it without a launcher")
    total = WARM_UP + rounds + WARM_UP
    recipe = recipe.model_copy(update={"max_steps": total, "max_tokens": None, "epochs": None})
    recipe = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"warmup_steps": 0})})
    plain = Contestant(recipe, directory, LayerSkipConfig(kind="layerskip"))
    num_layers = plain.module.backbone.num_layers
    if num_layers < 8:
        raise UserError(f"the model has {num_layers} layers; a rotation over L/4 exits needs 8 or more")
    batches = batches_of(plain.run, total)
    memory = memory_of_steps(recipe, directory, num_layers // 4, batches)
    contestants = {
        name: plain if name == PLAIN else Contestant(recipe, directory, objective)
        for name, objective in variants(num_layers, num_layers // 4).items()
    }
    peer = TrainerPeer(plain.run, directory)
    interleave(list(contestants.values()), peer, batches[: WARM_UP + rounds])
    update = plain.update_seconds(range(WARM_UP + rounds, total), batches)
    seconds = {name: contestant.seconds for name, contestant in contestants.items()}
    timed = range(WARM_UP, WARM_UP + rounds)
    flops = {
        name: sum(contestant.step_flops(step, batches[step]) for step in timed)
        for name, contestant in contestants.items()
    }
    timings = [
        timing(
            name,
            every[WARM_UP : WARM_UP + rounds],
            seconds[PLAIN][WARM_UP : WARM_UP + rounds],
            flops.get(name, flops[PLAIN]) / flops[PLAIN],
            update,
        )
        for name, every in (seconds | {TRAINER: peer.seconds}).items()
    ]
    return Report(recipe.model_dump(mode="json"), environment(plain.run), update, timings, memory)


def batches_of(run: Run, steps: int) -> list[list[Batch]]:
    """The micro-batches of the first steps."""
    batches = run.data.batches(
        run.training_rows,
        sequences=run.recipe.batch.sequences,
        micro=run.micro,
        seed=run.recipe.seed,
        start=0,
        stop=steps,
    )
    return list(batches)


def interleave(contestants: list[Contestant], peer: TrainerPeer, batches: list[list[Batch]]) -> None:
    """A B C D T, B C D A T, ...: every round has each once, the Trainer, in the middle of its own loop, last."""

    def others(step: int) -> None:
        first = step % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            contestant.step(step, batches[step])

    peer.train(batches, before_step=others)


def timing(name: str, seconds: list[float], plain: list[float], flops_ratio: float, update: float) -> Timing:
    """A variant beside the plain loop."""
    fixed = min(1.0, update / median(plain))
    ratio: Callable[..., Any] = lambda ours, theirs: np.median(ours / theirs, axis=-1)  # noqa: E731
    return Timing(
        name,
        seconds,
        bootstrap_interval(ratio, seconds, plain),
        flops_ratio,
        fixed + (1.0 - fixed) * flops_ratio,
    )


def _module(run: Run) -> EarlyExitModel:
    assert isinstance(run.objective, LayerSkip)
    return run.objective.module


def environment(run: Run) -> dict[str, Any]:
    """Where and with what this was measured."""
    (attention,) = {
        m.config._attn_implementation for m in run.objective.modules() if isinstance(m, PreTrainedModel)
    }
    return {
        "device": device_name(run.accelerator.device),
        "threads": torch.get_num_threads(),
        "precision": run.accelerator.mixed_precision,
        "attn_implementation": attention,
        "versions": versions(),
        "git_revision": git_revision(),
        "command": command_line(),
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    recipe: Annotated[
        str, typer.Argument(help="a YAML recipe whose model, data, batch and optimizer are used")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="recipe values to replace, batch.sequences=8"),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="timed steps of each variant")] = 20,
    output: Annotated[
        str, typer.Option("--output_dir", help="for training-cost.json and the tokenised data")
    ] = "runs/training-cost",
) -> None:
    """Time training steps of LayerSkip, its parts, the plain loop and transformers.Trainer, and measure memory.

    Of a recipe for heads on a frozen model: its steps, and the model's forward alone.
    """
    checked = load_recipe(recipe, overrides)
    with output_directory(output) as directory:
        assert directory is not None
        path = directory / "training-cost.json"
        if isinstance(checked.objective, FrozenModelSection) and checked.objective.freezes_model:
            found, run = time_heads(checked, directory, steps)
            told = {"recipe": checked.model_dump(mode="json"), "environment": environment(run)}
            path.write_text(json.dumps(told | asdict(found), indent=2) + "\n")
            show_heads(found, run)
            return
        report = benchmark(checked, directory, steps)
        path.write_text(json.dumps(asdict(report), indent=2) + "\n")
        show(report)


if __name__ == "__main__":
    run_app(app, "python -m train.benchmark")
