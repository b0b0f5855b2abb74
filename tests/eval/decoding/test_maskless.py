"""Attention that takes no mask, as flash attention: a stand-in for it that computes the same and refuses masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import FLASH_ATTENTION
from layerskip_model.runner import Runner
from tests.tiny_models import tiny_model

PROMPT = [3, 9, 4, 11, 7, 2, 8, 30, 12]
STRATEGIES: dict[str, dict[str, int]] = {
    "autoregressive": {},
    "self_speculative": {"exit_layer": 2, "num_speculations": 3},
}


def maskless(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [batch, heads, rows, dim], keys of all before; the last row sees all keys."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    rows, keys = query.shape[2], key.shape[2]
    distance = torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)[None]  # [rows, keys]
    seen = (distance >= 0) & (distance < (sliding_window or keys))
    scores = query @ key.mT * scaling
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


@pytest.fixture(params=["llama", "mistral", "gemma2"])
def runners(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Runner, Runner]:
    """The same model with eager attention and with the stand-in."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", maskless)
    model = tiny_model(request.param, attention="eager")
    model.config._attn_implementation = "flash_attention_2"
    return Runner(tiny_model(request.param, attention="eager")), Runner(model)


def run(runner: Runner, strategy: str, prompts: list[list[int]]) -> list[Generation]:
    drafter = make_drafter(strategy, runner, **STRATEGIES[strategy])
    return decode(runner, drafter, prompts, max_new_tokens=12, eos_token_ids=[])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_chains_need_no_mask(runners: tuple[Runner, Runner], strategy: str) -> None:
    expected, found = (run(runner, strategy, [PROMPT])[0] for runner in runners)
    assert (found.tokens, found.accepted_lengths) == (expected.tokens, expected.accepted_lengths)


def test_texts_of_different_lengths_are_refused(runners: tuple[Runner, Runner]) -> None:
    with pytest.raises(UserError, match="takes no mask"):
        run(runners[1], "autoregressive", [PROMPT, PROMPT[:4]])


def test_all_names_are_known_to_transformers() -> None:
    assert set(FLASH_ATTENTION) <= set(ALL_ATTENTION_FUNCTIONS.valid_keys())
