"""transformers.Trainer on the same model, data, optimizer and precision: what our plain loop is measured against."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from eval.clock import now
from train.model import build_model
from train.objectives.base import Batch
from train.objectives.layerskip import LayerSkip, LayerSkipConfig
from train.optimizer import build_optimizer
from train.run import Run


class TrainerPeer:
    """A Trainer around a model of its own, new and the same as that of `run`, which trains without LayerSkip.

    Its steps are timed from `on_step_begin` to `on_step_end`, as its own loop takes them: the batch is at hand
    before, as for our loop.
    """

    def __init__(self, run: Run, directory: Path) -> None:
        recipe = run.recipe.model_copy(update={"objective": LayerSkipConfig(kind="layerskip")})
        model = build_model(recipe.model, run.data.tokenizer, recipe.batch.length, recipe.seed)
        objective = LayerSkip.build(recipe, model)
        self.optimizer = build_optimizer(recipe.optimizer, objective)
        objective.module.backbone.release_layers()
        self.run, self.model, self.directory = run, model, directory
        self.device = run.accelerator.device
        self.seconds: list[float] = []

    def train(self, batches: list[list[Batch]], before_step: Callable[[int], None]) -> None:
        """One optimizer step for each list of micro-batches; `before_step(step)` comes before each, untimed."""
        recipe = self.run.recipe
        micro = [self._inputs(batch) for parts in batches for batch in parts]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: recipe.schedule.factor(step, recipe.total_steps)
        )
        arguments = TrainingArguments(
            output_dir=str(self.directory),
            max_steps=len(batches),
            per_device_train_batch_size=1,  # a micro-batch, which is put together already
            gradient_accumulation_steps=len(batches[0]),
            max_grad_norm=recipe.optimizer.clip_norm or 0.0,
            bf16=self.run.accelerator.mixed_precision == "bf16",
            use_cpu=self.device.type == "cpu",
            seed=recipe.seed,
            remove_unused_columns=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            logging_nan_inf_filter=False,  # it would wait for the device at every step
            dataloader_pin_memory=self.device.type != "cpu",
        )
        # Another epoch than these batches, so that accelerate sees no last batch where our loops run in between.
        rows: Any = micro + micro[: len(batches[0])]
        trainer = _InOrder(
            model=self.model,
            args=arguments,
            train_dataset=rows,
            data_collator=lambda items: items[0],
            optimizers=(self.optimizer, schedule),
            callbacks=[_Clock(self, before_step)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        level = logging.getLogger("transformers").level
        trainer.train()
        logging.getLogger("transformers").setLevel(level)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Labels are shifted already; the model takes such ones by another name."""
        shifted = batch["labels"]
        return {k: v for k, v in batch.items() if k != "row"} | {"shift_labels": shifted}


class _InOrder(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset
        return torch.utils.data.SequentialSampler(rows)


class _Clock(TrainerCallback):
    """Notes how long each step takes; what others do with accelerate before it is undone."""

    def __init__(self, peer: TrainerPeer, before_step: Callable[[int], None]) -> None:
        self.peer, self.before_step = peer, before_step
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Not timed up to here."""
        shared = self.peer.run.accelerator.gradient_state
        syncs = shared.sync_gradients
        self.before_step(state.global_step)
        shared._set_sync_gradients(syncs)
        self.began = now(self.peer.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The update is done."""
        self.peer.seconds.append(now(self.peer.device) - self.began)
