"""Whether an EAGLE head says here what it said when it was exported: at load, and in `python -m eval doctor`.

How far it is off is the mean difference of its log-probabilities over their spread (`head_probe.distance`). Of an EAGLE
and an EAGLE-3 head for an 8M LayerSkip model of 16 layers, which are as alike as layers get (docs/doctor.md):

    what is right: in float32 below 1e-6, in float16 up to 0.0004, in bfloat16 up to 0.0034
    one of three feature layers off by one 0.010 to 0.049, all three 0.023 and more, features of layer L - 1 0.021
    the head's RoPE base 10 times too large 0.016, 100 times 0.024; the model's, too, 0.044 and 0.067
    features one place off 0.14 and more, from before the norm 10

So in float32 whatever is beyond EXACT is wrong. In half precision the rounding of a deep model may reach as far as the
mildest mistakes; there it is wrong, too, if undoing a mistake leaves less of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from eval.decoding.drafters.eagle import EagleDraft
from eval.head_reading import HeadReader, Reading, turning
from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import DTYPES, has_plain_weights
from layerskip_model.formats.record import read_record
from layerskip_model.head_probe import Probe, distance, said
from layerskip_model.runner import Runner

EXACT = 1e-3
ROUNDING = {torch.float64: EXACT, torch.float32: EXACT, torch.float16: 0.05, torch.bfloat16: 0.05}
BETTER = 0.7  # a mistake explains what is off if it leaves less than this share of it


@dataclass(frozen=True)
class Agreement:
    """How far a head is off, and how far it may be.

    Attributes:
        mistake: what explains it, where something does, and how far it is off with that.
    """

    off: float
    allowed: float
    mistake: tuple[Reading, float] | None = None

    @property
    def is_right(self) -> bool:
        """Whether it says what it said."""
        return self.off <= self.allowed and self.mistake is None  # NaN is not

    def in_words(self) -> str:
        """Why it is not right."""
        words = f"its log-probabilities are off by {self.off:.2g} of their spread"
        if self.mistake is None:
            return f"{words}, and {self.allowed:g} is allowed"
        reading, left = self.mistake
        return f"{words}, and with {reading.name} by {left:.2g}"


@torch.inference_mode()
def compare(draft: EagleDraft, runner: Runner, probe: Probe) -> Agreement:
    """Have a head say the probe's tokens again, as decoding tells it them. Raises UserError for other tokens."""
    if not all(0 <= token < runner.vocab_size for token in probe.tokens):
        raise UserError(
            f"heads '{draft.name}': their probe has tokens that this model has not; they are for another one"
        )
    tokens = torch.tensor(probe.tokens, device=runner.device)
    reader = HeadReader(draft, runner)

    def off(reading: Reading) -> float:
        told = reader.told(reading, tokens)
        with turning(reader.head.layer, reading.rope):
            return distance(probe, list(said(reader.head, *told, tokens)))

    found = off(reader.right)
    allowed = max(ROUNDING[runner.dtype], ROUNDING[DTYPES[probe.dtype]])
    if found <= EXACT:
        return Agreement(found, allowed)
    # Another RoPE of the target's is no small mistake, and trying it costs passes of a target that may be slow.
    mistakes = [one for one in reader.mistakes() if one.base == 1.0 or not found <= allowed]
    left, best = min(((off(one), one) for one in mistakes), key=lambda pair: pair[0])
    return Agreement(found, allowed, (best, left) if left < BETTER * found else None)


def require_probe(draft: EagleDraft, runner: Runner, directory: Path) -> bool:
    """Refuse a head that says something else than when it was exported, as far as what lies beside it tells.

    Whether there is a probe; quantized targets say something else themselves, and are not asked. Raises UserError.
    """
    probe = read_record(directory).probe
    if probe is None or not has_plain_weights(runner.model):
        return probe is not None
    found = compare(draft, runner, probe)
    if not found.is_right:
        raise UserError(
            f"heads '{draft.name}' do not say here what they said when they were exported: {found.in_words()}; "
            "python -m eval doctor says more"
        )
    return True
