"""One token a step: the drafter that proposes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from eval.decoding.drafters.base import Drafter, Range, State
from eval.decoding.tree import Draft
from layerskip_model.runner import Runner


class Autoregressive(Drafter):
    """Proposes the root alone. With an exit layer the target is the model's first layers, unverified."""

    @dataclass(frozen=True)
    class Settings:
        """exit_layer: how many layers to run; None for all of them."""

        exit_layer: int | None = None

    def __init__(self, runner: Runner, settings: Settings) -> None:
        super().__init__(runner, settings)
        self.depth = runner.num_layers if settings.exit_layer is None else settings.exit_layer

    @classmethod
    def ranges(cls, runner: Runner) -> dict[str, Range]:
        """Any depth, the whole model included."""
        return {"exit_layer": (1, runner.num_layers)}

    def propose(self, state: State) -> Draft:
        """The last token, to be continued."""
        return state.chain(state.last)
