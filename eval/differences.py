"""Where outputs leave the baseline's: the first position, what lies between the two tokens, tie or bug."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.choosing import Choosing, make_rule
from eval.decoding.sampling import OWN, gumbel_noise, random_numbers
from eval.results import Difference
from eval.target import Target
from layerskip_model.backbone import model_device
from layerskip_model.formats.huggingface import has_plain_weights

LARGEST_REPLAY = 2_000_000_000  # parameters that are copied to float64 for a replay
LEAST_UNITS = 4  # of rounding that are always allowed, relative to the largest logit


class Examiner:
    """Judges differences on one target, in a float64 copy of it where there can be one that fits.

    A quantized model, or one spread over several devices, judges itself, and so does one that is too large.
    `choosing`: how the tokens were chosen, greedily by default; the replay shapes its logits in the same way.
    """

    def __init__(self, target: Target, choosing: Choosing | None = None) -> None:
        self.target = target
        self.choosing = Choosing() if choosing is None else choosing

    @cached_property
    def _judge(self) -> PreTrainedModel:
        model = self.target.model
        fits = has_plain_weights(model) and sum(p.numel() for p in model.parameters()) <= LARGEST_REPLAY
        return copy.deepcopy(model).cpu().double() if fits else model

    def compare(
        self, prompt: list[int], expected: list[int], got: list[int], stream: int = 0
    ) -> Difference | None:
        """None for equal outputs. "tie": rounding decides between the two tokens at the first difference.

        `stream`: the row's stream of random numbers, where tokens were drawn.
        """
        if expected == got:
            return None
        pairs = zip(expected, got, strict=False)
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
        wanted = expected[position] if position < len(expected) else None
        found = got[position] if position < len(got) else None
        if wanted is None or found is None:  # equal tokens end alike, so no rounding explains this
            return Difference(position=position, expected=wanted, got=found, verdict="bug")
        gap, allowed = self._gap(prompt, expected[:position], (wanted, found), stream)
        verdict = "tie" if gap <= allowed else "bug"
        return Difference(position=position, expected=wanted, got=found, gap=gap, verdict=verdict)

    @torch.inference_mode()
    def own_choices(self, prompt: list[int], tokens: list[int], stream: int = 0) -> list[int]:
        """What the model's own forward over the prompt and `tokens` would have said in place of each of them."""
        text = torch.tensor([prompt + tokens[:-1]], device=model_device(self.target.model))
        logits = self.target.model(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 :]
        texts = [prompt + tokens[:i] for i in range(len(tokens))]
        return self._preferences(texts, len(prompt), logits.cpu(), stream).argmax(dim=-1).tolist()

    def _gap(
        self, prompt: list[int], before: list[int], tokens: tuple[int, int], stream: int
    ) -> tuple[float, float]:
        """How far the worse of `tokens` is from being chosen after prompt and `before`, and what rounding allows.

        Rounding is measured here: how far what the target's dtype says is from what is exact. Where the target
        judges itself, it is how far that moves when the text goes on, which in exact arithmetic it would not.
        """
        text = prompt + before
        exact = next_logits(self._judge, text)
        if self._judge is self.target.model:
            again = next_logits(self.target.model, [*text, tokens[0]], len(text))
        else:
            again = next_logits(self.target.model, text)
        both = self._preferences([text, text], len(prompt), torch.stack([exact, again]), stream)
        gap, error, largest = likeliest_gap(both[0], both[1], tokens)
        # Norms and softmaxes compute in float32 in a float64 model too.
        unit = max(torch.finfo(self.target.runner.dtype).eps, torch.finfo(torch.float32).eps)
        return gap, max(2 * error, LEAST_UNITS * unit * largest)

    def _preferences(
        self, texts: Sequence[list[int]], prompt_length: int, logits: Tensor, stream: int
    ) -> Tensor:
        """What the rule takes the best of after each text, by its logits: shaped, and with noise, [texts, vocab]."""
        shaping = make_rule(self.target, self.choosing).shaping
        shaped = logits if shaping is None else shaping.after_texts(texts, prompt_length, logits)
        if not self.choosing.sample:
            return shaped
        places = [len(text) - prompt_length for text in texts]
        numbers = random_numbers(self.choosing.seed, [stream], max(places) + 1)[0, places, OWN]
        return shaped + gumbel_noise(torch.from_numpy(numbers), shaped)


def likeliest_gap(exact: Tensor, again: Tensor, tokens: Sequence[int]) -> tuple[float, float, float]:
    """How far the worse of `tokens` lies below the best logit; how far logits [vocab] are off; the largest.

    Two logits that rounding moves by up to e each can change places within a gap of 2e.
    """
    gap = float(exact.max() - exact[list(tokens)].min())
    possible = exact.isfinite() & again.isfinite()
    error = float((again - exact)[possible].abs().max())
    return gap, error, float(exact[possible].abs().max())


@torch.inference_mode()
def next_logits(model: PreTrainedModel, text: list[int], length: int | None = None) -> Tensor:
    """The logits after `text`, or after its first `length` tokens, by the model's own forward.

    In float64, on the CPU, [vocab].
    """
    tokens = torch.tensor([text], device=model_device(model))
    return model(input_ids=tokens, use_cache=False).logits[0, (length or len(text)) - 1].double().cpu()
