"""The contract between the training loop, which says when, and a method, which says how."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor, nn

from train.metrics import Metrics
from train.section import Section

Batch = dict[str, Any]
"""One micro-batch of one rank: tensors on the device, and `row`, a list of indexes in the global batch."""

Config = TypeVar("Config", bound=Section)


class Objective(nn.Module, Generic[Config]):
    """Everything one method of training knows: what is loaded, what trains, the loss, what is saved.

    The module's forward does all of the method's computation, so that DDP, FSDP2 and ZeRO-3 see one forward
    and nothing touches a submodule outside it. Add a method: subclass this in a file of `train/objectives/`
    and name it in `train.objectives.OBJECTIVES`.
    """

    config_class: ClassVar[type[Section]]
    """The section that stands under `objective:` in a recipe of this kind."""

    @classmethod
    @abstractmethod
    def build(cls, recipe: Any, model: Any) -> Self:
        """The module for a recipe, around its transformers model; marks what trains and what is frozen.

        Raises UserError where the recipe and the model don't go together.
        """

    def learning_rate_multiple(self, name: str) -> float:
        """How many times the recipe's learning rate the named parameter gets."""
        return 1.0

    @abstractmethod
    def count(self, batch: Batch) -> dict[str, int]:
        """Tokens that count in each term of the loss, before the forward.

        The loop sums them over micro-batches and ranks; the same names on every rank and in every batch.
        """

    @abstractmethod
    def forward(self, batch: Batch, step: int, denominators: dict[str, float]) -> tuple[Tensor, Metrics]:
        """The micro-batch's part of the global loss, and what to log.

        `denominators` are the sums of `count` over the whole global batch: sums divided by them and added over
        micro-batches and ranks give the mean over the global batch. In evaluation mode the metrics are what
        matters, and one called `loss` must be among them.
        """

    @abstractmethod
    def trainable_state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds and `load_trainable_state` takes: what trains, nothing frozen."""

    @abstractmethod
    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Put a checkpoint's tensors back; every one must be there."""

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Write what a user gets, in the format that others load."""

    @abstractmethod
    def suggestion(self, heldout: dict[str, float]) -> dict[str, Any]:
        """Strategy and settings to decode with, from the last held-out metrics, for `run.json`."""
