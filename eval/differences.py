"""Where outputs leave the baseline's: the first position, the gap of the two best logits, tie or bug."""

from __future__ import annotations

import copy
from functools import cached_property

import torch

from eval.results import Difference
from eval.target import Target

# Chunked and single-row matmuls round differently; logits then differ by some units in the last place of the
# largest value that was summed. A gap above this many of them is not rounding.
ROUNDING_UNITS = 64
LARGEST_REPLAY = 2_000_000_000  # parameters that are copied to float64 for a replay


class Examiner:
    """Judges differences on one target, in a float64 copy of it where that fits."""

    def __init__(self, target: Target) -> None:
        self.target = target

    @cached_property
    def _judge(self) -> torch.nn.Module:
        model = self.target.model
        fits = sum(p.numel() for p in model.parameters()) <= LARGEST_REPLAY
        return copy.deepcopy(model).double().cpu() if fits else model

    def compare(self, prompt: list[int], expected: list[int], got: list[int]) -> Difference | None:
        """None for equal outputs. "tie": the target's own two best tokens there differ by rounding at most."""
        if expected == got:
            return None
        pairs = zip(expected, got, strict=False)
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
        wanted = expected[position] if position < len(expected) else None
        found = got[position] if position < len(got) else None
        if wanted is None or found is None:  # one of them ended where the other went on
            return Difference(position=position, expected=wanted, got=found, verdict="bug")
        gap, allowed = self._gap(prompt + expected[:position], wanted, found)
        return Difference(
            position=position, expected=wanted, got=found, gap=gap, verdict="tie" if gap <= allowed else "bug"
        )

    @torch.inference_mode()
    def _gap(self, text: list[int], *tokens: int) -> tuple[float, float]:
        """How far the worse of `tokens` lies below the best logit after `text`, and what rounding allows."""
        judge = self._judge
        device = next(judge.parameters()).device
        logits = judge(input_ids=torch.tensor([text], device=device), use_cache=False).logits[0, -1].double()
        gap = float(logits.max() - logits[list(tokens)].min())
        unit = torch.finfo(self.target.runner.dtype).eps
        return gap, ROUNDING_UNITS * unit * float(logits.abs().max())
