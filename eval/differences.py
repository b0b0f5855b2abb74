"""Where outputs leave the baseline's: the first position, the gap of the two logits, tie or bug."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.results import Difference
from eval.target import Target

LARGEST_REPLAY = 2_000_000_000  # parameters that are copied to float64 for a replay
LEAST_UNITS = 4  # of rounding that are always allowed, relative to the largest logit


class Examiner:
    """Judges differences on one target, in a float64 copy of it where that fits."""

    def __init__(self, target: Target) -> None:
        self.target = target

    @cached_property
    def _judge(self) -> PreTrainedModel:
        model = self.target.model
        fits = sum(p.numel() for p in model.parameters()) <= LARGEST_REPLAY
        return copy.deepcopy(model).cpu().double() if fits else model

    def compare(self, prompt: list[int], expected: list[int], got: list[int]) -> Difference | None:
        """None for equal outputs. "tie": rounding decides between the two tokens at the first difference."""
        if expected == got:
            return None
        pairs = zip(expected, got, strict=False)
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
        wanted = expected[position] if position < len(expected) else None
        found = got[position] if position < len(got) else None
        if wanted is None or found is None:  # equal tokens end alike, so no rounding explains this
            return Difference(position=position, expected=wanted, got=found, verdict="bug")
        gap, allowed = self._gap(prompt + expected[:position], wanted, found)
        verdict = "tie" if gap <= allowed else "bug"
        return Difference(position=position, expected=wanted, got=found, gap=gap, verdict=verdict)

    def _gap(self, text: list[int], *tokens: int) -> tuple[float, float]:
        """How far the worse of `tokens` lies below the best logit after `text`, and what rounding allows.

        Two logits that rounding moves by up to e each can change places within a gap of 2e. e is measured
        here: how far the logits in the target's dtype are from the exact ones.
        """
        exact = next_logits(self._judge, text)
        gap = float(exact.max() - exact[list(tokens)].min())
        error = float((next_logits(self.target.model, text) - exact).abs().max())
        # Norms and softmaxes compute in float32 in a float64 model too.
        unit = max(torch.finfo(self.target.runner.dtype).eps, torch.finfo(torch.float32).eps)
        return gap, max(2 * error, LEAST_UNITS * unit * float(exact.abs().max()))


@torch.inference_mode()
def next_logits(model: PreTrainedModel, text: list[int]) -> Tensor:
    """The logits after `text` by the model's own forward, in float64 on the CPU, [vocab]."""
    tokens = torch.tensor([text], device=model.device)
    return model(input_ids=tokens, use_cache=False).logits[0, -1].double().cpu()
