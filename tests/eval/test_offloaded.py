"""Decoding with weights that are on disk until they are used: accelerate's hooks run in every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.differences import Examiner
from eval.target import Target
from layerskip_model.formats.huggingface import load_model
from layerskip_model.runner import Runner

PROMPTS = [[5, 9, 30, 7], [12, 3], [8, 8, 41, 2, 19, 4]]
STRATEGIES: dict[str, dict[str, int]] = {
    "autoregressive": {},
    "self_speculative": {"exit_layer": 2, "num_speculations": 3},
}


@pytest.fixture(scope="module")
def offloaded(finished_run: Path, tiny_target: Target) -> Target:
    """The tiny target, all of it but its first layer on disk."""
    where: dict[str, Any] = {f"model.layers.{i}": "disk" for i in range(1, 4)}
    where |= {"model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    where |= dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "disk")
    model = load_model(str(finished_run / "export"), dtype="float64", device_map=where)
    return Target("offloaded", model, tiny_target.tokenizer, Runner(model))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_the_tokens_are_the_same(
    tiny_target: Target, offloaded: Target, strategy: str, prompts: list[list[int]]
) -> None:
    found = []
    for target in (tiny_target, offloaded):
        drafter = make_drafter(strategy, target.runner, **STRATEGIES[strategy])
        generations = decode(target.runner, drafter, prompts, max_new_tokens=10, eos_token_ids=[])
        found.append([(one.tokens, one.accepted_lengths) for one in generations])
    assert found[0] == found[1]


def test_differences_are_judged_without_a_copy(offloaded: Target) -> None:
    judge = Examiner(offloaded)
    drafter = make_drafter("autoregressive", offloaded.runner)
    tokens = decode(offloaded.runner, drafter, PROMPTS[:1], max_new_tokens=3, eos_token_ids=[])[0].tokens
    found = judge.compare(PROMPTS[0], tokens, [*tokens[:2], (tokens[2] + 1) % 300])
    assert judge._judge is offloaded.model
    assert found is not None
    assert (found.position, found.verdict) == (2, "bug")
