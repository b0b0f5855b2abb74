"""The strategies of a benchmark by name, ours and transformers', behind one call."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from eval.contestants import make_contestant
from eval.decoding.cache import Cache
from eval.decoding.capture import GraphRunner
from eval.strategy_spec import parse_spec
from eval.target import Target
from layerskip_model.errors import UserError

GIVEN = {"exit_layer": 2, "num_speculations": 3}


def test_every_contestant_says_the_same(tiny_target: Target) -> None:
    names = ["autoregressive", "self_speculative", "hf_generate", "hf_early_exit"]
    contestants = [make_contestant(parse_spec(name), tiny_target, 10, GIVEN) for name in names]
    prompt = tiny_target.encode("def bert_1(")
    outputs = [contestant.decode([prompt], [0])[0].tokens for contestant in contestants]
    assert len(outputs[0]) == 10
    assert outputs == [outputs[0]] * 4
    again = [contestant.decode([prompt], [0])[0].tokens for contestant in contestants]
    assert again == outputs  # no leftover state
    assert [contestant.ours for contestant in contestants] == [True, True, False, False]
    assert [contestant.settings for contestant in contestants] == [{}, GIVEN, {}, GIVEN]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("hf_early_exit", {"exit_layer": 4, "num_speculations": 3}, "exit_layer=4 is not valid"),
        ("hf_early_exit", {"exit_layer": 0, "num_speculations": 3}, "exit_layer=0 is not valid"),
        ("hf_early_exit", {"exit_layer": 1, "num_speculations": 0}, "num_speculations=0 is not valid"),
    ],
)
def test_mistakes_are_named(tiny_target: Target, name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_contestant(parse_spec(name), tiny_target, 4, given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_decode_that_captured_something_is_done_again(tiny_target: Target) -> None:
    counted: list[int] = []

    class Counting(GraphRunner):
        def kept_cache(self, batch: int, capacity: int) -> Cache:
            counted.append(batch)
            return super().kept_cache(batch, capacity)

    target = dataclasses.replace(tiny_target, runner=Counting(tiny_target.runner))
    settings = {"exit_layer": 1, "num_speculations": 2}
    contestant = make_contestant(parse_spec("self_speculative"), target, 8, settings)
    plain = make_contestant(parse_spec("self_speculative"), tiny_target, 8, settings)
    for prompts, decodes in (([[5, 6, 7]], 2), ([[7, 8]], 1), ([[5, 6, 7], [8]], 2), ([[9, 8], [5]], 1)):
        counted.clear()
        streams = list(range(len(prompts)))
        rows = contestant.decode(prompts, streams)
        assert [row.tokens for row in rows] == [row.tokens for row in plain.decode(prompts, streams)]
        assert len(counted) == decodes
