"""transformers' own decoding, as peers in the same table."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import GenerationConfig

from eval.decoding.speculate import Generation
from eval.target import Target

Decode = Callable[[list[int]], Generation]


def hf_generate(target: Target, max_new_tokens: int) -> Decode:
    """`model.generate`, greedy."""
    return _generate(target, max_new_tokens, {})


def hf_early_exit(target: Target, max_new_tokens: int, exit_layer: int, num_speculations: int) -> Decode:
    """`model.generate(assistant_early_exit=E)`, drafting a constant number of tokens."""
    # transformers reads these from the assistant's generation config, and the assistant is the model itself.
    config = target.model.generation_config
    assert config is not None
    config.num_assistant_tokens = num_speculations
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0
    return _generate(target, max_new_tokens, {"assistant_early_exit": exit_layer})


def _generate(target: Target, max_new_tokens: int, extra: dict[str, int]) -> Decode:
    room = target.runner.context_length
    eos = target.eos_token_ids

    def decode(prompt: list[int]) -> Generation:
        tokens = torch.tensor([prompt], device=target.runner.device)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(max_new_tokens, room - len(prompt)),
            eos_token_id=eos or None,
            pad_token_id=eos[0] if eos else 0,
        )
        began = _now(target)
        output = target.model.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), generation_config=config, **extra
        )
        seconds = _now(target) - began
        new = output[0, len(prompt) :].tolist()
        reason = "eos" if new and new[-1] in eos else "length" if len(new) == max_new_tokens else "context"
        return Generation(tokens=new, finish_reason=reason, decode_seconds=seconds)

    return decode


def _now(target: Target) -> float:
    if target.runner.device.type != "cpu":
        torch.accelerator.synchronize(target.runner.device)
    return time.perf_counter()
