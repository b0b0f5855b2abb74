"""How tokens are chosen: what the user asks for and what the checkpoint's generation config says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.decoding.acceptance import Greedy, Rule
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import PROCESSORS, WARPERS, Shaping
from eval.decoding.typical import ALPHA, THRESHOLD, Typical
from eval.target import Target
from layerskip_model.errors import UserError

SAMPLING_FLAGS = ("temperature", "top_k", "top_p")

HARMLESS = frozenset(
    {
        # Said by the call: how long, from what to what, greedy or not.
        "max_length",
        "max_new_tokens",
        "do_sample",
        "bos_token_id",
        "pad_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        # How it is computed, and what is returned.
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "compile_config",
        "disable_compile",
        "low_memory",
        "prefill_chunk_size",
        "continuous_batching_config",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "renormalize_logits",
        "transformers_version",
        "_from_model_config",
        "_commit_hash",
        # Read by beam search, or by drafting with an assistant, only; what switches those on is refused.
        "early_stopping",
        "length_penalty",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "max_matching_ngram_size",
    }
)
"""Settings of a generation config that do not change which tokens come out here."""

OFF = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "token_healing": False,
    "use_mtp": False,
}
"""Of the settings that are not honoured: the value, beside None, at which they change nothing."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (
        lambda value: _is_number(value) and value > 0,
        "a number above 0, or --sample False for always the most likely token",
    ),
    "top_k": (lambda value: _is_whole(value) and value >= 0, "a whole number, 0 for all tokens"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and up to 1"),
    "seed": (lambda value: _is_whole(value) and 0 <= value < 2**64, "a whole number from 0 to 2^64 - 1"),
    "acceptance": (lambda value: value in ("lossless", "typical"), "lossless or typical"),
    "posterior_threshold": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "posterior_alpha": (lambda value: _is_number(value) and value >= 0, "a number of 0 or more"),
}
"""What may be given, and how that is said."""


@dataclass(frozen=True)
class Choosing:
    """What a user asks for. What is None is the checkpoint's, and off where the checkpoint says nothing.

    Attributes:
        sample: draw tokens; else always the most likely one.
        temperature: above 0.
        top_k: 0 for off.
        top_p: above 0 and up to 1, which is off.
        seed: of the random numbers, 0 to 2^64 - 1.
        acceptance: lossless; or typical, which keeps likely drafts and not the target's distribution.
        posterior_threshold, posterior_alpha: of typical acceptance, see `eval.decoding.typical.Typical`; None
            for its own.

    Raises UserError for values that make no sense, for the settings of sampling without `sample`, and for those of
    typical acceptance without it.
    """

    sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    acceptance: str = "lossless"
    posterior_threshold: float | None = None
    posterior_alpha: float | None = None

    def __post_init__(self) -> None:
        for name, (fits, wanted) in VALID.items():
            value = getattr(self, name)
            left_out = value is None and getattr(Choosing, name) is None  # its default
            if not left_out and not fits(value):
                raise UserError(f"--{name} {value} is not valid; give {wanted}")
        if self.given and not self.sample:
            name, value = next(iter(self.given.items()))
            raise UserError(f"--{name} {value} is for sampling: add --sample True, or leave --{name} out")
        if not self.lossless and not self.sample:
            raise UserError(
                "--acceptance typical is for sampling: greedily a draft is kept where it is the most likely token, "
                "which leaves nothing to relax; add --sample True, or leave --acceptance out"
            )
        for name in ("posterior_threshold", "posterior_alpha"):
            if self.lossless and getattr(self, name) is not None:
                raise UserError(
                    f"--{name} {getattr(self, name)} is for --acceptance typical: add that, or leave --{name} out"
                )

    @property
    def given(self) -> dict[str, float]:
        """The settings of sampling that the user gave."""
        return {name: getattr(self, name) for name in SAMPLING_FLAGS if getattr(self, name) is not None}

    @property
    def lossless(self) -> bool:
        """Whether every strategy's output is distributed as the target's own."""
        return self.acceptance == "lossless"

    @property
    def typical(self) -> tuple[float, float]:
        """The threshold and the alpha of typical acceptance."""
        threshold, alpha = self.posterior_threshold, self.posterior_alpha
        return THRESHOLD if threshold is None else threshold, ALPHA if alpha is None else alpha

    @property
    def in_words(self) -> str:
        """Greedy or sampled, and, where it is not, that it is not lossless."""
        if not self.sample:
            return "greedy"
        if self.lossless:
            return "sampled"
        threshold, alpha = self.typical
        return f"sampled (not lossless: typical acceptance, threshold {threshold:g}, alpha {alpha:g})"


def make_rule(target: Target, choosing: Choosing) -> Rule:
    """The rule that chooses tokens so.

    Raises UserError for what the checkpoint's generation config says and cannot be honoured.
    """
    settings = shaping_settings(target, choosing)
    shaping = Shaping(settings, target.eos_token_ids, target.runner.vocab_size)
    if not choosing.sample:
        return Greedy(shaping if settings else None)
    if choosing.lossless:
        return Sampling(shaping, choosing.seed)
    return Typical(shaping, choosing.seed, *choosing.typical)


def peer_config(target: Target, choosing: Choosing) -> dict[str, Any]:
    """GenerationConfig keywords with which transformers' `generate` chooses by the very same distribution.

    What is off is said to be off: an unset top_k would be 50 to `generate`. Lengths and special tokens are not
    among them. Raises UserError like `make_rule`.
    """
    unset = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if choosing.sample else {}
    return {"do_sample": choosing.sample, **unset, **shaping_settings(target, choosing)}


def shaping_settings(target: Target, choosing: Choosing) -> dict[str, Any]:
    """The settings that shape logits and are not off, the user's before the checkpoint's.

    A setting that is None is off, also top_k, for which transformers' `generate` would take 50. Warpers count
    only if tokens are sampled. Raises UserError for a setting of the checkpoint's that is on and cannot be
    honoured, and for one that neither transformers nor we know: it might change the output.
    """
    config = target.model.generation_config
    stored = {} if config is None else config.to_dict()
    known = {**PROCESSORS, **WARPERS}
    for name, value in sorted(stored.items()):
        if name not in known and name not in HARMLESS and value is not None and value != OFF.get(name):
            raise UserError(
                f"generation_config.{name}={value!r:.60} is not supported here and may change what is "
                "generated; remove it from the checkpoint's generation_config.json"
            )
    settings = {**stored, **choosing.given}
    return {
        name: settings[name]
        for name, setting in (known if choosing.sample else PROCESSORS).items()
        if settings.get(name) is not None and settings[name] not in setting.off
    }
