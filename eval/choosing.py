"""How tokens are chosen: what the user asks for and what the checkpoint's generation config says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from eval.decoding.acceptance import Greedy, Rule
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import PROCESSORS, WARPERS, Shaping
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


@dataclass(frozen=True)
class Choosing:
    """What a user asks for. What is None is the checkpoint's, and off where the checkpoint says nothing.

    Attributes:
        sample: draw tokens; else always the most likely one.
        temperature: above 0.
        top_k: 0 for off.
        top_p: above 0 and up to 1, which is off.
        seed: of the random numbers, 0 to 2^64 - 1.

    Raises UserError for values that make no sense, and for the settings of sampling without `sample`.
    """

    sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = self.given
        if given and not self.sample:
            name, value = next(iter(given.items()))
            raise UserError(f"--{name} {value} is for sampling: add --sample True, or leave --{name} out")
        if self.temperature is not None and not (_is_number(self.temperature) and self.temperature > 0):
            raise UserError(
                f"--temperature {self.temperature} is not valid; give a number above 0, or --sample False for "
                "always the most likely token"
            )
        if self.top_k is not None and not (_is_whole(self.top_k) and self.top_k >= 0):
            raise UserError(f"--top_k {self.top_k} is not valid; give a whole number, 0 for all tokens")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"--top_p {self.top_p} is not valid; give a number above 0 and up to 1")
        if not (_is_whole(self.seed) and 0 <= self.seed < 2**64):
            raise UserError(f"--seed {self.seed} is not valid; give a whole number from 0 to 2^64 - 1")

    @property
    def given(self) -> dict[str, float]:
        """The settings of sampling that the user gave."""
        return {name: getattr(self, name) for name in SAMPLING_FLAGS if getattr(self, name) is not None}


def make_rule(target: Target, choosing: Choosing) -> Rule:
    """The rule that chooses tokens so.

    Raises UserError for what the checkpoint's generation config says and cannot be honoured.
    """
    settings = shaping_settings(target, choosing)
    shaping = Shaping(settings, target.eos_token_ids, target.runner.vocab_size)
    if choosing.sample:
        return Sampling(shaping, choosing.seed)
    return Greedy(shaping if settings else None)


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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
