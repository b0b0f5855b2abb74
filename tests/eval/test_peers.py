"""transformers' own decoding: choosing as ours does, quiet, drafting as told, and leaving nothing behind."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation.candidate_generator import EarlyExitCandidateGenerator

from eval import peers
from eval.choosing import Choosing, make_rule
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from eval.target import Target
from layerskip_model.errors import UserError

GREEDY = Choosing()
PROMPTS = ["def anna_1(value):\n", "def bert", "    return"]


def hf_generate(target: Target, count: int) -> Callable[[list[int]], Generation]:
    """The peer for one prompt, greedy."""
    decode_batch = peers.hf_generate(target, count, GREEDY)
    return lambda prompt: decode_batch([prompt], [0])[0]


def hf_early_exit(target: Target, count: int, **settings: int) -> Callable[[list[int]], Generation]:
    """The same."""
    decode_batch = peers.hf_early_exit(target, count, GREEDY, **settings)
    return lambda prompt: decode_batch([prompt], [0])[0]


def expected(target: Target, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding by the model's forward over the whole text, again and again."""
    text = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = target.model(input_ids=torch.tensor([text]), use_cache=False).logits
        text.append(int(logits[0, -1].argmax()))
        if text[-1] in target.eos_token_ids:
            break
    return text[len(prompt) :]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_peers_decode_greedily(tiny_target: Target, prompt: str) -> None:
    ids = tiny_target.encode(prompt)
    plain = hf_generate(tiny_target, 12)(ids)
    early = hf_early_exit(tiny_target, 12, exit_layer=2, num_speculations=3)(ids)
    assert plain.tokens == early.tokens == expected(tiny_target, ids, 12)
    assert plain.finish_reason == early.finish_reason == "length"
    assert plain.decode_seconds > 0


def test_the_checkpoints_generation_config_is_honoured_as_ours_honours_it(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tiny_target.encode(PROMPTS[0])
    before = hf_generate(tiny_target, 12)(ids).tokens
    config: Any = tiny_target.model.generation_config
    honoured = {"repetition_penalty": 5.0, "suppress_tokens": [before[3]]}
    not_meant_for_us = {"do_sample": True, "use_cache": False, "max_new_tokens": 3}
    for key, value in (honoured | not_meant_for_us).items():
        monkeypatch.setattr(config, key, value)
    after = ours(tiny_target, ids, 12).tokens
    assert after != before
    assert len(after) == 12
    assert hf_generate(tiny_target, 12)(ids).tokens == after
    assert hf_early_exit(tiny_target, 12, exit_layer=1, num_speculations=2)(ids).tokens == after


def test_a_batch_is_decoded_like_its_prompts_alone(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [tiny_target.encode(prompt) for prompt in PROMPTS] + [[5] * 125]  # the context is 128
    free = [ours(tiny_target, prompt, 12).tokens for prompt in prompts]
    end = next(t for tokens in free for t in tokens[1:] if not all(t in others for others in free[:3]))
    monkeypatch.setattr(tiny_target.model.generation_config, "eos_token_id", end)
    together = peers.hf_generate(tiny_target, 12, GREEDY)(prompts, [0, 1, 2, 3])
    alone = [ours(tiny_target, prompt, 12) for prompt in prompts]
    assert {one.finish_reason for one in alone} == {"eos", "length", "context"}
    for ours_alone, theirs in zip(alone, together, strict=True):
        assert (theirs.tokens, theirs.finish_reason) == (ours_alone.tokens, ours_alone.finish_reason)
    assert len({one.decode_seconds for one in together}) == 1


def sampled(target: Target, choosing: Choosing, stream: int) -> list[list[int]]:
    ids = target.encode(PROMPTS[1])
    made = (
        peers.hf_generate(target, 12, choosing),
        peers.hf_early_exit(target, 12, choosing, exit_layer=2, num_speculations=3),
    )
    return [peer([ids], [stream])[0].tokens for peer in made]


def test_peers_sample_by_seed_and_stream_and_leave_torchs_numbers_alone(tiny_target: Target) -> None:
    hot = Choosing(sample=True, temperature=5.0)
    torch.manual_seed(3)
    expected_next = torch.rand(4)
    torch.manual_seed(3)
    first = sampled(tiny_target, hot, 0)
    assert torch.equal(torch.rand(4), expected_next)
    assert sampled(tiny_target, hot, 0) == first
    others = [
        sampled(tiny_target, hot, 1),
        sampled(tiny_target, Choosing(sample=True, temperature=5.0, seed=2**64 - 1), 0),
    ]
    for other in others:
        assert all(a != b for a, b in zip(first, other, strict=True))
    greedy = expected(tiny_target, tiny_target.encode(PROMPTS[1]), 12)
    assert first != [greedy] * 2
    for cold in (Choosing(sample=True, top_k=1), Choosing(sample=True, temperature=5.0, top_p=1e-6)):
        assert sampled(tiny_target, cold, 0) == [greedy] * 2


class DraftLengths:
    """Records how many tokens transformers drafts in each round, and how many it was allowed to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rounds: list[tuple[int, int]] = []
        original = EarlyExitCandidateGenerator.get_candidates

        def recorded(generator: Any, input_ids: Any, **kwargs: Any) -> Any:
            room = generator.main_model_max_length - input_ids.shape[1] - 1
            candidates, scores = original(generator, input_ids, **kwargs)
            self.rounds.append((candidates.shape[1] - input_ids.shape[1], room))
            return candidates, scores

        monkeypatch.setattr(EarlyExitCandidateGenerator, "get_candidates", recorded)


@pytest.mark.parametrize("drafts", [1, 3, 6])
def test_early_exit_drafts_a_constant_number(
    tiny_target: Target, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = DraftLengths(monkeypatch)
    peer = hf_early_exit(tiny_target, 30, exit_layer=1, num_speculations=drafts)
    for prompt in PROMPTS:  # twice, so that nothing learnt on one prompt shows on the next
        peer(tiny_target.encode(prompt))
    assert len(lengths.rounds) >= 3
    for drafted, room in lengths.rounds:
        assert drafted == min(drafts, room)


def test_peers_leave_the_model_and_its_config_alone(tiny_target: Target, tmp_path: Path) -> None:
    config: Any = tiny_target.model.generation_config
    before = config.to_dict()
    ids = tiny_target.encode(PROMPTS[0])
    layers = tiny_target.model.config.num_hidden_layers
    hf_generate(tiny_target, 8)(ids)
    hf_early_exit(tiny_target, 8, exit_layer=1, num_speculations=5)(ids)
    assert tiny_target.model.generation_config is config
    assert config.to_dict() == before
    assert tiny_target.model.config.num_hidden_layers == layers
    tiny_target.model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert not [key for key in saved if "assistant" in key]


def test_a_failure_while_drafting_does_not_shorten_the_model(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    ids = tiny_target.encode(PROMPTS[0])
    with monkeypatch.context() as patched:
        patched.setattr(EarlyExitCandidateGenerator, "_generate_candidates", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            hf_early_exit(tiny_target, 8, exit_layer=1, num_speculations=2)(ids)
    assert tiny_target.model.config.num_hidden_layers == 4
    assert hf_generate(tiny_target, 8)(ids).tokens == expected(tiny_target, ids, 8)


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_nothing_is_warned_about(tiny_target: Target) -> None:
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    logger, records = logging.getLogger("transformers"), Records()
    ids = tiny_target.encode(PROMPTS[0])
    logger.addHandler(records)
    try:
        hf_generate(tiny_target, 8)(ids)
        hf_early_exit(tiny_target, 8, exit_layer=1, num_speculations=2)(ids)
        peers.hf_generate(tiny_target, 8, GREEDY)([[5] * 125, ids], [0, 1])  # the context is 128
        assert records.messages == []
        logging.getLogger("transformers.generation.utils").warning("together with generation-related")
        assert len(records.messages) == 1  # nothing is hidden from others
    finally:
        logger.removeHandler(records)


def ours(target: Target, prompt: list[int], count: int) -> Generation:
    drafter = make_drafter("autoregressive", target.runner)
    eos = target.eos_token_ids
    rule = make_rule(target, GREEDY)
    return decode(target.runner, drafter, [prompt], max_new_tokens=count, eos_token_ids=eos, rule=rule)[0]


def test_peers_end_where_ours_ends(tiny_target: Target) -> None:
    near_the_end = [5] * 120  # the context is 128
    for prompt, count in ((near_the_end, 50), (near_the_end, 8), ([5] * 127, 3)):
        reference = ours(tiny_target, prompt, count)
        for peer in (
            hf_generate(tiny_target, count),
            hf_early_exit(tiny_target, count, exit_layer=2, num_speculations=4),
        ):
            found = peer(prompt)
            assert (found.tokens, found.finish_reason) == (reference.tokens, reference.finish_reason)


def test_eos_ends_a_peer(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny_target.encode(PROMPTS[0])
    free = ours(tiny_target, ids, 12).tokens
    end = free[6]
    monkeypatch.setattr(tiny_target.model.generation_config, "eos_token_id", [end, 0])
    reference = ours(tiny_target, ids, 12)
    assert reference.finish_reason == "eos"
    for peer in (
        hf_generate(tiny_target, 12),
        hf_early_exit(tiny_target, 12, exit_layer=1, num_speculations=3),
    ):
        found = peer(ids)
        assert (found.tokens, found.finish_reason) == (reference.tokens, "eos")


def test_a_prompt_beyond_the_context_is_refused(tiny_target: Target) -> None:
    with pytest.raises(UserError, match="context is 128"):
        hf_generate(tiny_target, 4)([5] * 128)


def test_no_logits_processor_slows_a_peer(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for processor in LogitsProcessor.__subclasses__():
        original = processor.__call__

        def spied(self: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            called.append(type(self).__name__)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(processor, "__call__", spied)
    hf_generate(tiny_target, 8)(tiny_target.encode(PROMPTS[0]))
    assert called == []
