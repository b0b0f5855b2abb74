"""What the user asks for and what the checkpoint says, as one rule, and the same to transformers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from eval.choosing import HARMLESS, OFF, Choosing, make_rule, peer_config
from eval.decoding.acceptance import Greedy
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import PROCESSORS, WARPERS
from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.decoding.typical import Typical
from eval.target import Target
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.tiny_models import tiny_model

RUNNER = Runner(tiny_model())
TOKENIZER: Any = SimpleNamespace(eos_token_id=None)
PROMPT = [3, 4, 5, 6]
TYPICAL = {"sample": True, "acceptance": "typical"}


def target_with(monkeypatch: pytest.MonkeyPatch, **stored: Any) -> Target:
    """A checkpoint whose generation config says this."""
    monkeypatch.setattr(RUNNER.model, "generation_config", GenerationConfig(**stored))
    return Target("tiny", RUNNER.model, TOKENIZER, RUNNER)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.5}, "--temperature 0.5 is for sampling: add --sample True"),
        ({"top_k": 0}, "--top_k 0 is for sampling"),
        ({"top_p": 1.0}, "--top_p 1.0 is for sampling"),
        ({"sample": True, "temperature": 0}, "--temperature 0 is not valid; give a number above 0"),
        ({"sample": True, "temperature": -1.0}, "--temperature -1.0"),
        ({"sample": True, "temperature": math.nan}, "--temperature nan"),
        ({"sample": True, "temperature": math.inf}, "--temperature inf"),
        ({"sample": True, "temperature": "warm"}, "--temperature warm"),
        ({"sample": True, "top_k": -1}, "--top_k -1 is not valid; give a whole number"),
        ({"sample": True, "top_k": 2.5}, "--top_k 2.5"),
        ({"sample": True, "top_k": True}, "--top_k True"),
        ({"sample": True, "top_p": 0.0}, "--top_p 0.0 is not valid; give a number above 0 and up to 1"),
        ({"sample": True, "top_p": 1.1}, "--top_p 1.1"),
        ({"seed": -1}, "--seed -1 is not valid"),
        ({"seed": 2**64}, "--seed 18446744073709551616 is not valid"),
        ({"seed": 0.5}, "--seed 0.5"),
        ({"seed": None}, "--seed None"),
        (
            {"sample": True, "acceptance": "loose"},
            "--acceptance loose is not valid; give lossless or typical",
        ),
        (
            {"acceptance": "typical"},
            "--acceptance typical is for sampling: greedily a draft is kept where it is",
        ),
        (
            {"sample": True, "posterior_alpha": 0.2},
            "--posterior_alpha 0.2 is for --acceptance typical: add that, or leave --posterior_alpha out",
        ),
        (
            {**TYPICAL, "posterior_threshold": 1.5},
            "--posterior_threshold 1.5 is not valid; give a number from",
        ),
        ({**TYPICAL, "posterior_threshold": True}, "--posterior_threshold True"),
        (
            {**TYPICAL, "posterior_alpha": -0.1},
            "--posterior_alpha -0.1 is not valid; give a number of 0 or more",
        ),
        ({**TYPICAL, "posterior_alpha": math.nan}, "--posterior_alpha nan"),
    ],
)
def test_values_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Choosing(**given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_greedy_without_settings_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.0, "max_length": 9}
    rule = make_rule(target_with(monkeypatch, **stored), Choosing())
    assert isinstance(rule, Greedy)
    assert rule.shaping is None
    monkeypatch.setattr(RUNNER.model, "generation_config", None)
    rule = make_rule(Target("tiny", RUNNER.model, TOKENIZER, RUNNER), Choosing(sample=True))
    assert isinstance(rule, Sampling)


def test_typical_acceptance_has_medusas_limits_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_with(monkeypatch, top_k=3)
    choosing = Choosing(sample=True, acceptance="typical")
    rule = make_rule(target, choosing)
    assert isinstance(rule, Typical)
    assert (rule.threshold, rule.alpha) == (0.09, 0.3)
    rule = make_rule(target, replace(choosing, posterior_threshold=0, posterior_alpha=2))
    assert isinstance(rule, Typical)
    assert (rule.threshold, rule.alpha) == (0, 2)
    # transformers' peers have no such rule: they sample from the same distribution.
    assert peer_config(target, choosing) == peer_config(target, Choosing(sample=True))


def test_what_is_not_lossless_says_so() -> None:
    assert Choosing().in_words == "greedy"
    assert Choosing(sample=True).in_words == "sampled"
    typical = Choosing(sample=True, acceptance="typical", posterior_alpha=0.5)
    assert typical.in_words == "sampled (not lossless: typical acceptance, threshold 0.09, alpha 0.5)"
    assert [one.lossless for one in (Choosing(), Choosing(sample=True), typical)] == [True, True, False]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9}),
        ({"top_k": 7}, {"do_sample": True, "temperature": 0.6, "top_k": 7, "top_p": 0.9}),
        (
            {"temperature": 1.0, "top_p": 1.0},
            {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        ),
    ],
)
def test_the_user_comes_before_the_checkpoint(
    given: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_with(monkeypatch, temperature=0.6, top_p=0.9, min_p=None)
    assert peer_config(target, Choosing(sample=True, **given)) == expected


def test_top_k_0_of_the_user_switches_the_checkpoints_off(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_with(monkeypatch, top_k=40)
    assert peer_config(target, Choosing(sample=True))["top_k"] == 40
    assert peer_config(target, Choosing(sample=True, top_k=0))["top_k"] == 0


STORED = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 3,
    "suppress_tokens": [4, 9],
    "min_new_tokens": 6,
}


@pytest.mark.parametrize("strategy", ["autoregressive", "self_speculative"])
def test_greedy_as_the_checkpoint_says(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, `generate` on the checkpoint as it is, and `generate` told by peer_config: all the same."""
    target = target_with(monkeypatch, **STORED)
    settings = {} if strategy == "autoregressive" else {"exit_layer": 2, "num_speculations": 3}
    tokens = torch.tensor([PROMPT])
    first = decode(
        RUNNER, make_drafter("autoregressive", RUNNER), [PROMPT], max_new_tokens=4, eos_token_ids=()
    )
    target_with(monkeypatch, **STORED, eos_token_id=first[0].tokens[2])
    rule = make_rule(target, Choosing())
    drafter = make_drafter(strategy, RUNNER, **settings)
    ours = decode(RUNNER, drafter, [PROMPT], max_new_tokens=12, eos_token_ids=target.eos_token_ids, rule=rule)
    call: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0}
    plain = RUNNER.model.generate(tokens, do_sample=False, **call)  # type: ignore[operator]
    told = GenerationConfig(eos_token_id=target.eos_token_ids, **call, **peer_config(target, Choosing()))
    monkeypatch.setattr(RUNNER.model, "generation_config", GenerationConfig())
    other = RUNNER.model.generate(tokens, generation_config=told)  # type: ignore[operator]
    assert [*PROMPT, *ours[0].tokens] == plain[0].tolist() == other[0].tolist()
    assert ours[0].tokens[:4] != first[0].tokens


def test_transformers_is_told_of_an_unset_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left unset, `generate` would take the 50 best of the 64 tokens."""
    target = target_with(monkeypatch)
    told = GenerationConfig(max_new_tokens=1, pad_token_id=0, **peer_config(target, Choosing(sample=True)))
    told.return_dict_in_generate = told.output_scores = True
    output = RUNNER.model.generate(torch.tensor([PROMPT]), generation_config=told)  # type: ignore[operator]
    assert output.scores[0].isfinite().all()


@pytest.mark.parametrize(
    "stored",
    [
        {"num_beams": 4},
        {"num_return_sequences": 2, "num_beams": 2},
        {"guidance_scale": 1.5},
        {"penalty_alpha": 0.6},
        {"constraints": ["some"]},
        {"force_words_ids": [[3]]},
        {"watermarking_config": {"bias": 2.0}},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 2},
        {"stop_strings": ["end"]},
        {"max_time": 2.0},
        {"forced_bos_token_id": 3},
        {"forced_eos_token_id": 3},
        {"encoder_repetition_penalty": 1.2},
        {"token_healing": True},
        {"dola_layers": "high"},
        {"house_style": "terse"},
    ],
    ids=str,
)
@pytest.mark.parametrize("sample", [True, False])
def test_what_cannot_be_honoured_is_refused_by_name(
    stored: dict[str, Any], sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_with(monkeypatch, **stored)
    for use in (make_rule, peer_config):
        with pytest.raises(UserError) as caught:
            use(target, Choosing(sample=sample))
        message = str(caught.value)
        assert any(message.startswith(f"generation_config.{name}=") for name in stored)
        assert "is not supported here" in message
        assert "\n" not in message


def test_every_setting_of_transformers_is_known_or_refused() -> None:
    """A new one of a new version has to be looked at."""
    refused = {
        *(
            "assistant_early_exit",
            "assistant_ensemble_weight",
            "constraints",
            "dola_layers",
            "force_words_ids",
        ),
        *("forced_bos_token_id", "forced_eos_token_id", "max_time", "prompt_lookup_num_tokens"),
        *("speculation_type", "stop_strings", "watermarking_config"),
    }
    settings = set(GenerationConfig().to_dict())
    assert settings <= refused | HARMLESS | set(OFF) | set(PROCESSORS) | set(WARPERS)


OLD = """{"max_length": 20, "min_length": 0, "early_stopping": false, "num_beams": 1, "num_beam_groups": 1,
"diversity_penalty": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "typical_p": 1.0, "top_p": 1.0,
"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "num_return_sequences": 1, "temperature": 1.0,
"remove_invalid_values": false, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0}"""


def test_defaults_that_are_written_out_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older checkpoints store them all."""
    target = target_with(monkeypatch, **json.loads(OLD))
    rule = make_rule(target, Choosing())
    assert isinstance(rule, Greedy)
    assert rule.shaping is None
    off = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert peer_config(target, Choosing(sample=True)) == off
