"""transformers' own decoding, as peers in the same table: set up as its users do, and greedy like ours."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from eval.clock import now
from eval.decoding.speculate import Generation, check_prompt
from eval.target import Target

Decode = Callable[[list[int]], Generation]


def hf_generate(target: Target, max_new_tokens: int) -> Decode:
    """`model.generate`, greedy."""
    return _generate(target, max_new_tokens, {}, {})


def hf_early_exit(target: Target, max_new_tokens: int, exit_layer: int, num_speculations: int) -> Decode:
    """`model.generate(assistant_early_exit=E)`, drafting a constant number of tokens."""
    # transformers takes the first from the call and the others from the assistant's generation config, and
    # the assistant is the model itself. Without a threshold of zero unsure drafts are cut short.
    drafting = {
        "num_assistant_tokens": num_speculations,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    return _generate(target, max_new_tokens, {"assistant_early_exit": exit_layer}, drafting)


def _generate(
    target: Target, max_new_tokens: int, call: dict[str, Any], model_wide: dict[str, Any]
) -> Decode:
    eos = target.eos_token_ids
    greedy = {"do_sample": False, "eos_token_id": eos or None, "pad_token_id": eos[0] if eos else 0}
    model = with_generation_config(target.model, GenerationConfig(**greedy, **model_wide))

    def decode(prompt: list[int]) -> Generation:
        check_prompt(target.runner, 0, prompt)
        room = target.runner.context_length - len(prompt)
        config = GenerationConfig(**greedy, **call, max_new_tokens=min(max_new_tokens, room))
        tokens = torch.tensor([prompt], device=target.runner.device)
        mask = torch.ones_like(tokens)
        with _quiet_and_restored(model):
            began = now(target.runner.device)
            output = model.generate(tokens, attention_mask=mask, generation_config=config)  # type: ignore[operator]
            seconds = now(target.runner.device) - began
        new = output[0, len(prompt) :].tolist()
        at_room = "length" if max_new_tokens <= room else "context"
        reason = "eos" if new and new[-1] in eos else at_room
        return Generation(tokens=new, finish_reason=reason, decode_seconds=seconds)

    return decode


def with_generation_config(model: PreTrainedModel, config: GenerationConfig) -> PreTrainedModel:
    """The same model, weights and all, with another generation config; the given one keeps its own.

    So neither the model's defaults (a repetition penalty, say) nor another peer's settings reach this one.
    """
    twin = copy.copy(model)
    twin.generation_config = config
    return twin


@contextmanager
def _quiet_and_restored(model: PreTrainedModel) -> Iterator[None]:
    """Mend what `assistant_early_exit` leaves: a shortened model after a failure, and a deprecation warning.

    The warning is about how transformers' own drafting calls `generate`.
    """
    config = model.config.get_text_config()
    num_layers = config.num_hidden_layers
    logger = logging.getLogger("transformers.generation.utils")
    logger.addFilter(_no_deprecation)
    try:
        yield
    finally:
        logger.removeFilter(_no_deprecation)
        config.num_hidden_layers = num_layers


def _no_deprecation(record: logging.LogRecord) -> bool:
    return "together with generation-related" not in record.getMessage()
