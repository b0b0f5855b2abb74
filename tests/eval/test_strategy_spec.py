"""Entries of `--strategies`: how they are read, which settings they take, and the one line that a wrong one gets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from eval.decoding.strategies import STRATEGIES
from eval.strategy_spec import (
    PEERS,
    Spec,
    check_given,
    parse_spec,
    peer_settings,
    setting_types,
    settings_for,
)
from eval.target import Target
from layerskip_model.errors import UserError


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("greedy", "autoregressive", {}),
        ("self_speculative", "self_speculative", {}),
        ("self_speculative:draft_tree", "self_speculative", {"draft_tree": True}),
        (
            " self_speculative : exit_layer = 2:draft_tree=false ",
            "self_speculative",
            {"exit_layer": 2, "draft_tree": False},
        ),
        (
            "self_speculative:draft_stop=confidence:stop_threshold=0.25",
            "self_speculative",
            {"draft_stop": "confidence", "stop_threshold": 0.25},
        ),
        ("speculative_sampling:draft=a/b=c", "speculative_sampling", {"draft": "a/b=c"}),
        ("hf_prompt_lookup:max_ngram=-2", "hf_prompt_lookup", {"max_ngram": -2}),  # refused for a model
    ],
)
def test_an_entry_is_read_by_the_types_of_its_settings(
    text: str, name: str, settings: dict[str, Any]
) -> None:
    spec = parse_spec(text)
    assert spec == Spec(name, settings)
    assert [type(value) for value in spec.settings.values()] == [type(value) for value in settings.values()]
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("self_speculativ", "unknown strategy 'self_speculativ', did you mean 'self_speculative'?"),
        ("hf_generat", "did you mean 'hf_generate'?"),
        ("", "unknown strategy ''"),
        (
            "self_speculative:exit_layr=2",
            "'self_speculative:exit_layr=2': self_speculative has no setting 'exit_layr', did you mean 'exit_layer'?",
        ),
        ("hf_early_exit:draft_tree", "no setting 'draft_tree'; its settings: exit_layer, num_speculations"),
        ("autoregressive:exit_layer=2", "autoregressive has no setting 'exit_layer'; its settings: none"),
        ("prompt_lookup:", "prompt_lookup has no setting ''"),
        ("prompt_lookup:max_ngram", "'max_ngram' is not valid; give max_ngram=a whole number"),
        ("prompt_lookup:max_ngram=2.5", "'max_ngram=2.5' is not valid; give max_ngram=a whole number"),
        ("prompt_lookup:max_ngram=2:max_ngram=3", "max_ngram is given twice"),
        ("self_speculative:draft_tree=yes", "'draft_tree=yes' is not valid; give draft_tree=True or False"),
        ("self_speculative:stop_threshold=x", "give stop_threshold=a number"),
    ],
)
def test_a_wrong_entry_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_spec(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_peers_have_the_settings_of_ours(tiny_target: Target) -> None:
    for name, peer in PEERS.items():
        ours = {field.name for field in dataclasses.fields(STRATEGIES[peer.ours].Settings)}
        assert ours >= set(peer.takes) == setting_types(name).keys()
    complete = peer_settings("hf_prompt_lookup", tiny_target, {"max_ngram": 2})
    defaults = STRATEGIES["prompt_lookup"].Settings()
    assert complete == {"max_ngram": 2, "num_speculations": defaults.num_speculations}
    with pytest.raises(
        UserError, match=r"hf_prompt_lookup: max_ngram=0 is not valid; give a whole number of 1 or"
    ):
        peer_settings("hf_prompt_lookup", tiny_target, {"max_ngram": 0})
    with pytest.raises(UserError, match="hf_early_exit needs exit_layer: a whole number from 1 to 3"):
        peer_settings("hf_early_exit", tiny_target, {"num_speculations": 2})


def test_an_entrys_own_settings_come_first_and_the_suggestion_last(tiny_target: Target) -> None:
    assert tiny_target.run is not None
    suggested = tiny_target.run.suggested
    flags = {"num_speculations": 7, "max_ngram": 2}

    def found(text: str, **given: Any) -> dict[str, Any]:
        return settings_for(parse_spec(text), tiny_target, given)

    for name in ("self_speculative", "hf_early_exit"):
        assert found(name) == suggested
        assert found(name, **flags) == suggested | {"num_speculations": 7}
        assert found(f"{name}:num_speculations=3", **flags) == suggested | {"num_speculations": 3}
    assert found("prompt_lookup") == found("hf_prompt_lookup") == {}  # they keep their own defaults
    assert found("prompt_lookup:max_ngram=4", **flags) == {"num_speculations": 7, "max_ngram": 4}
    assert found("autoregressive", exit_layer=2) == {}


def test_what_no_entry_takes_is_refused() -> None:
    check_given([Spec("autoregressive"), Spec("hf_prompt_lookup")], {"max_ngram": 3})
    with pytest.raises(
        UserError,
        match=r"^--draft DIR: none of the --strategies takes it; it is for speculative_sampling, medusa, hydra, ",
    ):
        check_given([Spec("autoregressive"), Spec("prompt_lookup")], {"max_ngram": 3, "draft": "DIR"})
    with pytest.raises(
        UserError, match=r"--exit_layer 2: none .* it is for self_speculative, hf_early_exit$"
    ):
        check_given([Spec("autoregressive")], {"exit_layer": 2})  # the baseline is the whole model
    with pytest.raises(UserError, match="no strategy has it"):
        check_given([Spec("autoregressive")], {"exit_layr": 2})
