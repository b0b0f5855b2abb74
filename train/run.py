"""One run and what it works with: data, model, objective and optimizer, ready for the engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn

from train.config import Recipe
from train.data.packing import Rows
from train.data.prepare import PreparedData, prepare
from train.engine import Engine, full_size, new_accelerator, new_engine
from train.log import RunLog
from train.model import build_model, tokenizer_config
from train.objectives import OBJECTIVES
from train.objectives.base import Objective
from train.optimizer import build_optimizer
from train.run_directory import DATA_NAME


@dataclass
class Run:
    """Everything that one run works with."""

    recipe: Recipe[Any]  # with its number of steps
    directory: Path
    engine: Engine
    data: PreparedData
    training_rows: Rows
    heldout_rows: Rows
    log: RunLog

    @property
    def accelerator(self) -> Accelerator:
        """What the processes talk through."""
        return self.engine.accelerator

    @property
    def objective(self) -> Objective[Any]:
        """What is trained."""
        return self.engine.objective

    @property
    def module(self) -> nn.Module:
        """The objective as the engine wraps it; forwards go through this one."""
        return self.engine.module

    @property
    def optimizer(self) -> Any:
        """The optimizer as the engine wraps it."""
        return self.engine.optimizer

    @property
    def micro(self) -> int:
        """The most sequences of one forward on one rank."""
        return self.recipe.batch.micro or self.recipe.batch.sequences


def set_up(recipe: Recipe[Any], directory: Path, state: PartialState) -> Run:
    """Data, model, objective and optimizer, prepared for the engine that the process was launched with."""
    log = RunLog(directory, recipe.log, recipe.model_dump(mode="json"), active=state.is_main_process)
    length = recipe.batch.length
    data = prepare(recipe.data, tokenizer_config(recipe.model), directory / DATA_NAME, state, length=length)
    for note in data.notes:
        log.say(note)
    if not data.is_streamed and len(data.training) < recipe.batch.sequences:
        rows = f"{len(data.training)} rows of {length} tokens"
        log.say(
            f"all training data are {rows}, fewer than the {recipe.batch.sequences} of a step: they repeat"
        )
    recipe = recipe.with_total_steps(len(data.training))
    accelerator = new_accelerator(recipe, state.num_processes)
    model = build_model(recipe.model, data.tokenizer, length, recipe.seed)
    torch.manual_seed(recipe.seed)  # new weights of the objective: the same on every rank
    objective = OBJECTIVES[recipe.objective.kind].build(recipe, model)
    training_rows = objective.rows(data.training, "train")  # which may decide on what trains
    heldout_rows = objective.rows(data.heldout, "heldout")
    for note in objective.notes():
        log.say(note)
    optimizer = build_optimizer(recipe.optimizer, objective)
    trained = sum(full_size(p) for p in objective.parameters() if p.requires_grad)
    log.say(
        f"{trained:,} parameters train, {data.amount}, {recipe.total_steps:,} steps of "
        f"{recipe.batch.sequences} x {recipe.batch.length}, {state.num_processes} process(es), "
        f"{accelerator.mixed_precision} autocast on {accelerator.device}"
    )
    return Run(
        recipe=recipe,
        directory=directory,
        engine=new_engine(accelerator, objective, optimizer),
        data=data,
        training_rows=training_rows,
        heldout_rows=heldout_rows,
        log=log,
    )
