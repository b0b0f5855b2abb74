"""transformers with a draft model and with prompt lookup: set up as ours are, quiet, and leaving nothing behind."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    PromptLookupCandidateGenerator,
)

from eval import peers
from eval.choosing import Choosing
from eval.decoding.speculate import Generation
from eval.draft_model import DraftModel
from eval.target import Target
from layerskip_model.errors import UserError
from tests.eval.decoding.drafts import draft_of
from tests.eval.test_peers import Records, ours

GREEDY = Choosing()
SAMPLED = Choosing(sample=True, temperature=5.0, top_k=40, top_p=0.95)
PROMPTS = ["def anna_1(value):\n    return value + 1\n\ndef", "def bert", "    return"]
Make = Callable[..., Callable[[list[int]], Generation]]


@pytest.fixture(scope="module")
def draft(tiny_target: Target) -> DraftModel:
    """The target's first half."""
    return draft_of(tiny_target.model, 2)


@pytest.fixture(params=["assisted", "prompt_lookup"])
def make(request: pytest.FixtureRequest, tiny_target: Target, draft: DraftModel) -> Make:
    """`make(count, num_speculations, choosing)`: one of the peers, for one prompt."""

    def assisted(count: int, drafts: int, choosing: Choosing = GREEDY) -> Callable[[list[int]], Generation]:
        if request.param == "assisted":
            decode = peers.hf_assisted(tiny_target, count, choosing, draft=draft, num_speculations=drafts)
        else:
            decode = peers.hf_prompt_lookup(
                tiny_target, count, choosing, max_ngram=3, num_speculations=drafts
            )
        return lambda prompt: decode([prompt], [0])[0]

    return assisted


@pytest.mark.parametrize("prompt", PROMPTS)
def test_they_say_what_ours_says(make: Make, tiny_target: Target, prompt: str) -> None:
    ids = tiny_target.encode(prompt)
    found = make(16, 3)(ids)
    assert found.tokens == ours(tiny_target, ids, 16).tokens
    assert found.decode_seconds > 0


def test_they_end_where_ours_ends(make: Make, tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    for prompt, count in (([5] * 120, 50), ([5] * 127, 3)):  # the context is 128
        reference = ours(tiny_target, prompt, count)
        found = make(count, 4)(prompt)
        assert (found.tokens, found.finish_reason) == (reference.tokens, reference.finish_reason)
    ids = tiny_target.encode(PROMPTS[0])
    monkeypatch.setattr(
        tiny_target.model.generation_config, "eos_token_id", [ours(tiny_target, ids, 12).tokens[6], 0]
    )
    reference = ours(tiny_target, ids, 12)
    assert (make(12, 3)(ids).tokens, reference.finish_reason) == (reference.tokens, "eos")


@pytest.mark.parametrize("drafts", [1, 3, 6])
def test_the_draft_model_drafts_a_constant_number(
    tiny_target: Target, draft: DraftModel, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[tuple[int, int]] = []
    original = AssistedCandidateGenerator.get_candidates

    def recorded(generator: Any, input_ids: Any, **kwargs: Any) -> Any:
        room = generator.main_model_max_length - input_ids.shape[1] - 1
        candidates, scores = original(generator, input_ids, **kwargs)
        rounds.append((candidates.shape[1] - input_ids.shape[1], room))
        return candidates, scores

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", recorded)
    decode = peers.hf_assisted(tiny_target, 20, GREEDY, draft=draft, num_speculations=drafts)
    for prompt in PROMPTS[:2]:
        decode([tiny_target.encode(prompt)], [0])
    assert len(rounds) >= 3
    for drafted, room in rounds:
        assert drafted == min(drafts, room)


def test_prompt_lookup_has_our_settings(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    original = PromptLookupCandidateGenerator.__init__

    def recorded(generator: Any, *args: Any, **kwargs: Any) -> None:
        original(generator, *args, **kwargs)
        made.append((generator.num_output_tokens, generator.max_matching_ngram_size))

    monkeypatch.setattr(PromptLookupCandidateGenerator, "__init__", recorded)
    decode = peers.hf_prompt_lookup(tiny_target, 8, GREEDY, max_ngram=4, num_speculations=7)
    decode([tiny_target.encode(PROMPTS[0])], [0])
    assert made == [(7, 4)]


def test_they_sample_by_seed_and_stream(make: Make, tiny_target: Target) -> None:
    ids = tiny_target.encode(PROMPTS[1])
    first = make(12, 3, SAMPLED)(ids).tokens
    assert make(12, 3, SAMPLED)(ids).tokens == first
    assert make(12, 3, Choosing(sample=True, temperature=5.0, seed=1))(ids).tokens != first
    assert make(12, 3, Choosing(sample=True, top_k=1))(ids).tokens == ours(tiny_target, ids, 12).tokens


def test_they_leave_the_models_alone_and_are_quiet(
    make: Make, tiny_target: Target, draft: DraftModel
) -> None:
    configs: list[Any] = [tiny_target.model.generation_config, draft.runner.model.generation_config]
    before = [config.to_dict() for config in configs]
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    logger, records = logging.getLogger("transformers"), Records()
    logger.addHandler(records)
    try:
        for choosing in (GREEDY, SAMPLED):
            make(8, 3, choosing)(tiny_target.encode(PROMPTS[0]))
        make(8, 3)([5] * 125)
    finally:
        logger.removeHandler(records)
    assert records.messages == []
    assert [config.to_dict() for config in configs] == before
    assert tiny_target.model.generation_config is configs[0]
    assert draft.runner.model.generation_config is configs[1]
    assert torch.is_tensor(draft.runner.model.get_output_embeddings().weight)


def test_a_draft_model_of_another_width_is_refused(tiny_target: Target) -> None:
    wider = draft_of(tiny_target.model, 1, vocabulary=tiny_target.runner.vocab_size + 8)
    with pytest.raises(
        UserError, match="hf_assisted: 'first layers' has logits of 308 tokens and the target of 300"
    ):
        peers.hf_assisted(tiny_target, 8, GREEDY, draft=wider, num_speculations=3)
