"""Medusa: heads that each guess a token further on, independently of each other (arXiv 2401.10774)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eval.decoding.drafters.base import State
from eval.decoding.drafters.heads import DraftHeads, HeadsDrafter, HeadSettings
from layerskip_model.medusa import MedusaHeads


@dataclass(frozen=True)
class MedusaDraft(DraftHeads):
    """Medusa heads."""

    spoken: ClassVar[str] = "a directory of Medusa heads, or the run that trained them (--draft DIR)"

    heads: MedusaHeads


class Medusa(HeadsDrafter):
    """All levels come from one state: nodes of a level have the same children, whatever path leads to them."""

    @dataclass(frozen=True)
    class Settings(HeadSettings):
        """See `HeadSettings`."""

        draft: MedusaDraft

    def draft(self, state: State, depth: int) -> Tensor:
        """See `HeadsDrafter.draft`."""
        heads: MedusaHeads = self.settings.draft.heads
        logits = torch.cat([heads.logits(index, self.hidden) for index in range(depth)], dim=1)
        # A rule may look at the text before: that of the heads' first choices.
        chain = state.chain(torch.cat([state.last, logits[:, :-1].argmax(dim=-1)], dim=1))
        preferences = state.rule.preferences(state, logits, chain)  # [batch, depth, vocab]
        return torch.cat([state.last, self.layout.descendants(preferences)], dim=1)

    def along(self, hidden: Tensor, tokens: Tensor, first: int) -> Iterator[Tensor]:
        """See `HeadsDrafter.along`."""
        heads: MedusaHeads = self.settings.draft.heads
        for index in range(heads.number):
            yield heads.logits(index, hidden[first : max(first, len(tokens) - 2 - index)])
