"""Hydra: heads that each read what was drafted before their token (arXiv 2402.05109)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from eval.decoding.acceptance import Outcome
from eval.decoding.draft_layer import LayerState, draft_layer_runner
from eval.decoding.drafters.base import State
from eval.decoding.drafters.heads import DraftHeads, HeadsDrafter, HeadSettings
from eval.decoding.static_tree import TreeShape
from layerskip_model.hydra import HydraHeads
from layerskip_model.layer_runner import LayerRunner
from layerskip_model.runner import Runner


@dataclass(frozen=True)
class HydraDraft(DraftHeads):
    """Hydra heads. `prefix` runs their prefix attention, where they have it (Hydra++)."""

    spoken: ClassVar[str] = "a directory of Hydra heads, or the run that trained them (--draft DIR)"

    heads: HydraHeads
    prefix: LayerRunner | None = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, heads: HydraHeads, tree: TreeShape, runner: Runner) -> Self:
        """Heads for that runner's model. Raises UserError where their prefix attention cannot be decoded with."""
        prefix = None if heads.prefix is None else draft_layer_runner(runner, heads.prefix)
        return cls(name, heads, heads.number, tree, prefix)


class Hydra(HeadsDrafter):
    """Level by level: a head reads the tokens on the path to a node and offers that node's children.

    With prefix attention it drafts from what the heads' own decoder layer makes of the states of all that is committed.
    Its cache is as long as the target's, and takes each step's accepted path.
    """

    @dataclass(frozen=True)
    class Settings(HeadSettings):
        """See `HeadSettings`."""

        draft: HydraDraft

    def start(self, state: State, prompts: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """Take the state of each prompt's last token; of all its tokens for prefix attention."""
        prefix: LayerRunner | None = self.settings.draft.prefix
        if prefix is None:
            super().start(state, prompts, hidden)
            return
        self._prefix = LayerState(prefix, state, self.max_nodes)
        self.hidden = self._extended(hidden[self._last_layer], [len(prompt) for prompt in prompts])

    def advance(self, outcome: Outcome) -> None:
        """Take the state of the last accepted node; of all accepted ones for prefix attention."""
        if self.settings.draft.prefix is None:
            super().advance(outcome)
            return
        longest = max(map(len, outcome.path))
        padded = [path + [0] * (longest - len(path)) for path in outcome.path]
        states = outcome.states[self._last_layer]
        nodes = torch.tensor(padded, device=states.device)
        row = torch.arange(len(padded), device=states.device)[:, None]
        self.hidden = self._extended(states[row, nodes], [len(path) for path in outcome.path])

    def draft(self, state: State, depth: int) -> Tensor:
        """See `HeadsDrafter.draft`."""
        heads: HydraHeads = self.settings.draft.heads
        layout, tokens = self.layout, state.last
        for level in range(depth):
            # [batch, inner, level + 1, hidden]
            path = self.runner.embed(tokens[:, layout.path_to_inner[level]])
            logits = heads.logits(level, self.hidden.expand(-1, path.shape[1], -1), path)
            preferences = state.rule.preferences(state, logits, self.tree(state, tokens, level))
            tokens = torch.cat([tokens, layout.children(level, preferences)], dim=1)
        return tokens

    def along(self, hidden: Tensor, tokens: Tensor, first: int) -> Iterator[Tensor]:
        """See `HeadsDrafter.along`. Each guess is told the text's own tokens before it, as if all drafts were right."""
        heads: HydraHeads = self.settings.draft.heads
        if heads.prefix is not None:
            hidden = heads.prefix(hidden[None])[0]
        embedded = self.runner.embed(tokens[None])[0]  # [seq, hidden]
        for index in range(heads.number):
            stop = max(first, len(tokens) - 2 - index)
            path = [embedded[first + ahead : stop + ahead] for ahead in range(1, index + 2)]
            yield heads.logits(index, hidden[first:stop], torch.stack(path, dim=1))

    def _extended(self, states: Tensor, counts: list[int]) -> Tensor:
        """What prefix attention makes of the next states of each row, counts[b] of row b: that of the last one."""
        outputs = self._prefix.extend(self.runner.normed(states), counts)  # [batch, n, hidden]
        last = torch.tensor(counts, device=outputs.device).clamp(min=1) - 1  # a row that had ended has none
        return outputs[torch.arange(len(counts), device=outputs.device), last][:, None]
