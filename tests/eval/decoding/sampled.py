"""What the tests of sampling share: many draws, their exact probabilities, and a test of the one by the other."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.decoding.acceptance import Rule
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.distribution import pearson
from layerskip_model.runner import Runner
from tests.tiny_models import agreeing_model

VOCABULARY = 6
ROWS = 20_000
TOKENS = 4  # the first by the prefill, then up to two drafts and the target's own
PROMPT = [3, 1, 4, 1, 5]
LOWEST = 1e-4
"""A p-value below this is a failure. The seeds are fixed: a test that passes once passes always."""
DECISIVE = 1e-12
"""A wrong rule must do worse than this."""


def sampled_model(*, layers: int = 2) -> PreTrainedModel:
    """Six tokens, of which several are likely, and an exit that agrees in part."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return agreeing_model(
        layers=1,
        scale=1.5,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        max_position_embeddings=32,
        **sizes,
    )


def sampling(settings: dict[str, Any], seed: int = 0) -> Sampling:
    """The rule with these settings of a generation config."""
    return Sampling(Shaping(settings, (), VOCABULARY), seed)


def draws(runner: Runner, strategy: str, rule: Rule, rows: int = ROWS, **settings: Any) -> Tensor:
    """The same prompt continued many times in one batch, each row on a stream of its own, [rows, TOKENS]."""
    drafter = make_drafter(strategy, runner, **settings)
    done = decode(runner, drafter, [PROMPT] * rows, max_new_tokens=TOKENS, eos_token_ids=(), rule=rule)
    return torch.tensor([generation.tokens for generation in done])


def text_probabilities(model: PreTrainedModel, settings: dict[str, Any]) -> Tensor:
    """The probability of every continuation of PROMPT by TOKENS tokens, [VOCABULARY ** TOKENS].

    By the model's own forward over all of them.
    """
    probability = torch.ones(1, dtype=torch.float64)
    for length in range(TOKENS):
        texts = [PROMPT + list(rest) for rest in product(range(VOCABULARY), repeat=length)]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor(texts)).logits[:, -1].double()  # [texts, vocab]
        probability = (probability[:, None] * naive_distribution(logits, settings)).flatten()
    return probability


def naive_distribution(logits: Tensor, settings: dict[str, Any]) -> Tensor:
    """Temperature, top-k and top-p (the fewest tokens that have the mass), [n, vocab] -> probabilities."""
    p = (logits / settings.get("temperature", 1.0)).softmax(dim=-1)
    for row in p:
        order = row.argsort(descending=True)
        row[order[settings.get("top_k", len(row)) :]] = 0.0
        row /= row.sum()
        before = row[order].cumsum(0) - row[order]  # the mass of the tokens that are likelier
        row[order[before >= settings.get("top_p", 1.0)]] = 0.0
    return p / p.sum(dim=-1, keepdim=True)


def p_value(tokens: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square test of draws [rows, count] against the probabilities of all texts.

    A text that cannot be is proof: 0.
    """
    rows, count = tokens.shape
    index = (tokens * VOCABULARY ** torch.arange(count - 1, -1, -1)).sum(dim=1)
    observed = torch.bincount(index, minlength=VOCABULARY**count).double()
    wanted = expected * rows
    if (observed[wanted == 0] > 0).any():
        return 0.0
    return pearson(observed, wanted).p_value
