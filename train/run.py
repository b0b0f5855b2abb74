"""One run and what it works with: data, model, objective and optimizer, ready for the engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import nn

from train.config import Recipe
from train.data.packing import PackedDataset, Rows, cut_for_rank
from train.data.prepare import PreparedData, prepare
from train.log import RunLog
from train.model import build_model, mixed_precision, tokenizer_config
from train.objectives import OBJECTIVES
from train.objectives.base import Objective
from train.optimizer import build_optimizer
from train.run_directory import DATA_NAME


@dataclass
class Run:
    """Everything that one run works with."""

    recipe: Recipe[Any]  # with its number of steps
    directory: Path
    accelerator: Accelerator
    objective: Objective[Any]
    module: nn.Module  # the objective as the engine wraps it
    optimizer: Any
    data: PreparedData
    training_rows: Rows
    heldout_rows: Rows
    log: RunLog

    @property
    def micro(self) -> int:
        """The most sequences of one forward on one rank."""
        return self.recipe.batch.micro or self.recipe.batch.sequences


def set_up(recipe: Recipe[Any], directory: Path, state: PartialState) -> Run:
    """Data, model, objective and optimizer, prepared for the engine that the process was launched with."""
    log = RunLog(directory, recipe.log, recipe.model_dump(mode="json"), active=state.is_main_process)
    data = prepare(recipe.data, tokenizer_config(recipe.model), directory / DATA_NAME, state)
    training = PackedDataset(data.train, recipe.batch.length)
    heldout = PackedDataset(data.heldout, recipe.batch.length, keep_last=True)
    recipe = recipe.with_total_steps(len(training))
    accelerator = new_accelerator(recipe, state.num_processes)
    model = build_model(recipe.model, data.tokenizer, recipe.batch.length, recipe.seed)
    torch.manual_seed(recipe.seed)  # new weights of the objective: the same on every rank
    objective = OBJECTIVES[recipe.objective.kind].build(recipe, model)
    optimizer = build_optimizer(recipe.optimizer, objective)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    log.say(
        f"{trained:,} parameters train, {data.train.tokens:,} tokens, {recipe.total_steps:,} steps of "
        f"{recipe.batch.sequences} x {recipe.batch.length}, {state.num_processes} process(es), "
        f"{accelerator.mixed_precision} autocast on {accelerator.device}"
    )
    module, optimizer = accelerator.prepare(objective, optimizer)
    return Run(
        recipe=recipe,
        directory=directory,
        accelerator=accelerator,
        objective=objective,
        module=module,
        optimizer=optimizer,
        data=data,
        training_rows=objective.rows(training, "train"),
        heldout_rows=objective.rows(heldout, "heldout"),
        log=log,
    )


def new_accelerator(recipe: Recipe[Any], ranks: int) -> Accelerator:
    """The engine's front, in the precision and with the accumulation of the recipe."""
    # accelerate keeps the first Accelerator's precision for the whole process; a second run may want another.
    AcceleratorState._reset_state()
    sequences = recipe.batch.sequences
    micro_batches = cut_for_rank(sequences, recipe.batch.micro or sequences, rank=0, world=ranks)
    return Accelerator(
        mixed_precision=mixed_precision(recipe.model), gradient_accumulation_steps=len(micro_batches)
    )
