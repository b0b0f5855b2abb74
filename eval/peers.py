"""transformers' own decoding, as peers in the same table: set up as its users do, choosing tokens as ours does."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from eval.choosing import Choosing, peer_config
from eval.clock import now
from eval.decoding.drafters.speculative_sampling import DraftModel
from eval.decoding.speculate import Generation, row_limits
from eval.target import Target
from layerskip_model.errors import UserError

Decode = Callable[[list[list[int]], list[int]], list[Generation]]
"""Prompts and the streams of their random numbers -> what each got."""


def hf_generate(target: Target, max_new_tokens: int, choosing: Choosing) -> Decode:
    """`model.generate`."""
    return _generate(target, max_new_tokens, choosing)


def hf_early_exit(
    target: Target, max_new_tokens: int, choosing: Choosing, exit_layer: int, num_speculations: int
) -> Decode:
    """`model.generate(assistant_early_exit=E)`, drafting a constant number of tokens, for one prompt at a time."""
    # transformers takes the first from the call and the others from the assistant's generation config, and
    # the assistant is the model itself.
    return _generate(
        target,
        max_new_tokens,
        choosing,
        call={"assistant_early_exit": exit_layer},
        model_wide=_constant_drafts(num_speculations),
    )


def hf_assisted(
    target: Target, max_new_tokens: int, choosing: Choosing, draft: DraftModel, num_speculations: int
) -> Decode:
    """`model.generate(assistant_model=...)`, drafting a constant number of tokens, for one prompt at a time.

    Raises UserError for a draft model whose logits have another width: transformers takes these for two tokenizers.
    """
    ours, theirs = target.runner.vocab_size, draft.runner.vocab_size
    if ours != theirs:
        raise UserError(
            f"hf_assisted: '{draft.name}' has logits of {theirs} tokens and the target of {ours}, which transformers "
            "takes for another tokenizer; leave hf_assisted out, or name another --draft"
        )
    config = _chosen(target, choosing) | _constant_drafts(num_speculations)
    assistant = with_generation_config(draft.runner.model, GenerationConfig(**config))
    return _generate(target, max_new_tokens, choosing, arguments={"assistant_model": assistant})


def hf_prompt_lookup(
    target: Target, max_new_tokens: int, choosing: Choosing, max_ngram: int, num_speculations: int
) -> Decode:
    """`model.generate(prompt_lookup_num_tokens=...)`, for one prompt at a time."""
    call = {"prompt_lookup_num_tokens": num_speculations, "max_matching_ngram_size": max_ngram}
    return _generate(target, max_new_tokens, choosing, call=call)


def _constant_drafts(count: int) -> dict[str, Any]:
    """What an assistant's generation config says to that end. Without a threshold of 0 unsure drafts are cut short."""
    return {
        "num_assistant_tokens": count,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }


def _chosen(target: Target, choosing: Choosing) -> dict[str, Any]:
    """Keywords of a generation config: how tokens are chosen, and which end a text."""
    eos = target.eos_token_ids
    return peer_config(target, choosing) | {"eos_token_id": eos or None, "pad_token_id": eos[0] if eos else 0}


def _generate(
    target: Target,
    max_new_tokens: int,
    choosing: Choosing,
    *,
    call: dict[str, Any] | None = None,
    model_wide: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
) -> Decode:
    """`generate` with settings of the call's generation config, of the model's, and arguments beside them."""
    eos, runner = target.eos_token_ids, target.runner
    chosen = _chosen(target, choosing)
    pad = chosen["pad_token_id"]
    model = with_generation_config(target.model, GenerationConfig(**chosen, **(model_wide or {})))

    def decode(prompts: list[list[int]], streams: list[int]) -> list[Generation]:
        limits = row_limits(runner, prompts, max_new_tokens, frozenset(eos), None)
        longest = max(limit.room for limit in limits)
        config = GenerationConfig(**chosen, **(call or {}), max_new_tokens=longest)
        width = max(map(len, prompts))
        padded = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
        tokens = torch.tensor(padded, device=runner.device)
        real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        mask = torch.tensor(real, device=runner.device)
        inputs = {"attention_mask": mask, "generation_config": config, **(arguments or {})}
        with _quiet_and_restored(model), _seeded(choosing.seed, streams[0], runner.device):
            began = now(runner.device)
            output = model.generate(tokens, **inputs)  # type: ignore[operator]
            seconds = now(runner.device) - began
        generations = [Generation(decode_seconds=seconds) for _ in prompts]
        for limit, generation, row in zip(limits, generations, output[:, width:].tolist(), strict=True):
            limit.extend(generation, row)  # up to the row's own end; what follows is padding
        return generations

    return decode


@contextmanager
def _seeded(seed: int, stream: int, device: torch.device) -> Iterator[None]:
    """transformers draws from torch's generators, one stream for a whole batch: seed them by its first."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(hash((seed, stream)))
        yield


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

    That warning is about how transformers' own drafting calls `generate`. Another is about a padded batch that
    grows longer than the context, though none of its rows is used beyond it.
    """
    config = model.config.get_text_config()
    num_layers = config.num_hidden_layers
    loggers = [
        logging.getLogger(f"transformers.generation.{part}") for part in ("utils", "stopping_criteria")
    ]
    for logger in loggers:
        logger.addFilter(_not_needless)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_not_needless)
        config.num_hidden_layers = num_layers


def _not_needless(record: logging.LogRecord) -> bool:
    needless = ("together with generation-related", "exceeded the model's predefined maximum length")
    return not any(text in record.getMessage() for text in needless)
