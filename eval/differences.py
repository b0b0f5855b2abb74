"""Where outputs leave the baseline's: the first position, the gap of the two logits, tie or bug."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.choosing import Choosing, shaping_settings
from eval.results import Difference
from eval.target import Target
from layerskip_model.backbone import model_device
from layerskip_model.formats.huggingface import has_plain_weights

LARGEST_REPLAY = 2_000_000_000  # parameters that are copied to float64 for a replay
LEAST_UNITS = 4  # of rounding that are always allowed, relative to the largest logit


class Examiner:
    """Judges differences on one target, in a float64 copy of it where there can be one that fits.

    A quantized model, or one spread over several devices, judges itself, and so does one that is too large.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    @cached_property
    def _judge(self) -> PreTrainedModel:
        model = self.target.model
        fits = has_plain_weights(model) and sum(p.numel() for p in model.parameters()) <= LARGEST_REPLAY
        return copy.deepcopy(model).cpu().double() if fits else model

    def compare(self, prompt: list[int], expected: list[int], got: list[int]) -> Difference | None:
        """None for equal outputs. "tie": rounding decides between the two tokens at the first difference.

        "unknown" where the checkpoint's generation config changes the logits (a repetition penalty, say).
        """
        if expected == got:
            return None
        pairs = zip(expected, got, strict=False)
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
        wanted = expected[position] if position < len(expected) else None
        found = got[position] if position < len(got) else None
        if wanted is None or found is None:  # equal tokens end alike, so no rounding explains this
            return Difference(position=position, expected=wanted, got=found, verdict="bug")
        if shaping_settings(self.target, Choosing()):  # the choice was not between the model's own logits
            return Difference(position=position, expected=wanted, got=found)
        gap, allowed = self._gap(prompt + expected[:position], wanted, found)
        verdict = "tie" if gap <= allowed else "bug"
        return Difference(position=position, expected=wanted, got=found, gap=gap, verdict=verdict)

    def _gap(self, text: list[int], *tokens: int) -> tuple[float, float]:
        """How far the worse of `tokens` lies below the best logit after `text`, and what rounding allows.

        Two logits that rounding moves by up to e each can change places within a gap of 2e. e is measured
        here: how far the logits in the target's dtype are from the exact ones. Where the target judges itself,
        it is how far they move when the text goes on, which in exact arithmetic they would not.
        """
        exact = next_logits(self._judge, text)
        gap = float(exact.max() - exact[list(tokens)].min())
        if self._judge is self.target.model:
            again = next_logits(self.target.model, [*text, tokens[0]], len(text))
        else:
            again = next_logits(self.target.model, text)
        error = float((again - exact).abs().max())
        # Norms and softmaxes compute in float32 in a float64 model too.
        unit = max(torch.finfo(self.target.runner.dtype).eps, torch.finfo(torch.float32).eps)
        return gap, max(2 * error, LEAST_UNITS * unit * float(exact.abs().max()))


@torch.inference_mode()
def next_logits(model: PreTrainedModel, text: list[int], length: int | None = None) -> Tensor:
    """The logits after `text`, or after its first `length` tokens, by the model's own forward.

    In float64, on the CPU, [vocab].
    """
    tokens = torch.tensor([text], device=model_device(model))
    return model(input_ids=tokens, use_cache=False).logits[0, (length or len(text)) - 1].double().cpu()
