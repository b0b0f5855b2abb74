"""The contract between the training loop, which says when, and a method, which says how."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.decoding.drafters.base import Drafter
from eval.decoding.strategies import make_drafter
from eval.replay import OwnText
from layerskip_model.runner import Runner
from train.data.packing import Rows
from train.metrics import Metrics
from train.section import Section

Batch = dict[str, Any]
"""One micro-batch of one rank: tensors stacked over its rows, and `row`, their indexes in the global batch."""


class States(NamedTuple):
    """Which states of a frozen model a method learns from, one vector of `width` numbers a token."""

    name: str
    width: int


FINAL_STATES = "final"  # the name of those that enter the LM head, after the final norm

Config = TypeVar("Config", bound=Section)


class Objective(nn.Module, Generic[Config]):
    """Everything one method of training knows: what is loaded, what trains, the loss, what is saved.

    The module's forward does all of the method's computation, so that DDP, FSDP2 and ZeRO-3 see one forward
    and nothing touches a submodule outside it. Add a method: subclass this in a file of `train/objectives/`
    and name it in `train.objectives.OBJECTIVES`.
    """

    config_class: ClassVar[type[Section]]
    """The section that stands under `objective:` in a recipe of this kind."""

    has_features: bool = False
    """Whether batches come with `features`; who makes them says so."""

    @classmethod
    @abstractmethod
    def build(cls, recipe: Any, model: Any) -> Self:
        """The module for a recipe, around its transformers model; marks what trains and what is frozen.

        Also called beforehand, with a model of meta tensors, to find mistakes before anything is loaded.
        Raises UserError where the recipe and the model don't go together.
        """

    def learning_rate_multiple(self, name: str) -> float:
        """How many times the recipe's learning rate the named parameter gets."""
        return 1.0

    def rows(self, windows: Rows, part: Literal["train", "heldout"]) -> Rows:
        """What batches are made of: by default windows of tokens, `input_ids` and `labels` shifted by one.

        A method that wants more beside them wraps them and adds it to each row (what a frozen model makes of them
        comes by itself, see `features`). As many rows as before; a row whose labels are all IGNORE_INDEX only
        fills up a rank and must count nothing.
        """
        return windows

    def notes(self) -> list[str]:
        """What the log should tell about what `rows` made of the data. Default: nothing."""
        return []

    def features(self) -> States | None:
        """What of a frozen model the method learns from, so that it can be computed once. Default: nothing.

        Then there are two more kinds of batch. With `features` [batch, seq, width] `forward` uses them in place of
        the model's forward; of one without `labels` it returns them, and no metrics.
        """
        return None

    @abstractmethod
    def count(self, batch: Batch) -> dict[str, int]:
        """Tokens that count in each term of the loss, before the forward; the batch is still on the host.

        The loop sums them over micro-batches and ranks; the same names on every rank and in every batch.
        """

    @abstractmethod
    def forward(self, batch: Batch, step: int, denominators: dict[str, float]) -> tuple[Tensor, Metrics]:
        """The micro-batch's part of the global loss, and what to log.

        The batch is on the device, `row` a list. `denominators` are the sums of `count` over the whole global
        batch: sums divided by them and added over micro-batches and ranks give the mean over the global batch.
        Metrics have the same names on every rank, and `loss` among them. In evaluation mode they are all that
        matters; a method that trains the language model itself gives `bits_per_token` too, which the loop
        turns into bits per byte. Random numbers from torch's generator are the same after a resume.
        """

    def run_beside(self, micro: int, length: int) -> Any:
        """What trains beside a frozen model, run over so many tokens; for the estimate of what it keeps of them.

        On tensors without values. Default: nothing.
        """

    def trainable_state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds: every parameter that trains, a shared one once, nothing frozen."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Put a checkpoint's tensors back. Raises ValueError unless names and shapes are exactly the module's."""
        ours = self.trainable_state()
        if differing := sorted(ours.keys() ^ state.keys()):
            raise ValueError(f"other parameters than this recipe's: {', '.join(differing[:3])}")
        for name, parameter in ours.items():
            if parameter.shape != state[name].shape:
                raise ValueError(f"{name} is {list(state[name].shape)} there, {list(parameter.shape)} here")
            parameter.data.copy_(state[name])

    @abstractmethod
    def export(
        self, directory: Path, state: dict[str, Tensor], dtype: torch.dtype, heldout: dict[str, float]
    ) -> None:
        """Write what a user gets, in the format that others load. On the main process only.

        `state` is this module's whole state_dict, as an engine that shards parameters gathered it: read weights
        from there, not from the module. What is exported is rounded to `dtype`. `heldout` are the last held-out
        metrics, empty where there are none, for what tells how good it is.
        """

    def exported_heads(self) -> str | None:
        """The folder of the export that holds heads for its model, as run.json tells it. Default: there are none.

        ".": the export is heads and nothing else; they belong to the model that the recipe names.
        """
        return None

    @abstractmethod
    def suggestion(
        self, heldout: dict[str, float], written: OwnText | None, fixed: dict[str, int]
    ) -> dict[str, Any]:
        """The best strategy to decode with, as `run.json` tells it: `strategy`, `settings`, `predicted_speedup`.

        By what is known: the last held-out metrics (none yet: empty), and text that the model wrote itself, where
        it could be decoded. `fixed` are settings that are given; the others are chosen. `acceptance_length` beside
        them: tokens a forward, where it was decoded with.
        """

    def decodable(self) -> PreTrainedModel | None:
        """The language model to decode with while it trains. Default: nothing is decoded."""
        return None

    def drafter(self, suggestion: dict[str, Any], runner: Runner) -> Drafter:
        """What drafts for the model in training as suggested. Default: a strategy that its settings say all of.

        `runner` runs `decodable`. Raises UserError where it cannot be decoded with.
        """
        return make_drafter(suggestion["strategy"], runner, **suggestion["settings"])

    def schedule(self, step: int) -> dict[str, list[float]]:
        """What the method changes over time, as in force at an optimizer step: name -> a number for each layer."""
        return {}

    def in_words(self, step: int, metrics: dict[str, float]) -> str:
        """The method's part of the progress line, from what is in force at a step and the last metrics."""
        return ""

    def step_flops(self, step: int, sequences: int, length: int) -> float | None:
        """Model FLOPs of an optimizer step over the global batch, recomputation apart. None: not known."""
        return None
