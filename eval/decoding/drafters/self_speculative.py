"""Self-speculation: the first layers draft, the other layers verify (section 4.3 of arXiv 2404.16710)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eval.decoding.drafters.base import Drafter, Range, State
from eval.decoding.tree import Draft
from layerskip_model.runner import Runner


class SelfSpeculative(Drafter):
    """Drafts a chain with layers 0..E-1 and the LM head, over the target's own cache.

    The keys, values and exit states of the drafts are kept, so the verification enters at layer E and no
    layer runs twice for a token.
    """

    @dataclass(frozen=True)
    class Settings:
        """exit_layer: E, the layers that draft. num_speculations: d, the drafts a step."""

        exit_layer: int
        num_speculations: int

    def __init__(self, runner: Runner, settings: Settings) -> None:
        super().__init__(runner, settings)
        self.exit_layer = settings.exit_layer
        self.num_speculations = settings.num_speculations
        self.max_nodes = settings.num_speculations + 1

    @classmethod
    def ranges(cls, runner: Runner) -> dict[str, Range]:
        """Some layer has to be left for the verification."""
        return {"exit_layer": (1, runner.num_layers - 1), "num_speculations": (1, None)}

    def propose(self, state: State) -> Draft:
        """A chain of up to d drafts, fewer near the end, with the states that leave layer E-1."""
        drafts = state.chain_length(self.num_speculations)
        tokens = [state.last]  # [batch, 1] each
        exits = []  # [batch, 1, hidden] each
        q = []  # [batch, 1, vocab] each, if the drafts are drawn
        for index in range(drafts + 1):
            context = state.chain_context(index, 1)
            drafting = index < drafts  # nobody drafts from the last one: the target does
            result = self.runner.forward(tokens[-1], 0, self.exit_layer, context, head=drafting)
            exits.append(result.hidden)
            if result.logits is not None:
                token, distribution = state.rule.draft(state, result.logits, tokens)
                tokens.append(token)
                if distribution is not None:
                    q.append(distribution)
        return state.chain(
            torch.cat(tokens, dim=1),
            entry_layer=self.exit_layer,
            hidden=torch.cat(exits, dim=1),
            q=torch.cat(q, dim=1) if q else None,
        )
