"""Decoding prompts with a strategy, from Python and line by line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from eval import Generator, load_target
from eval.generate import interact
from eval.target import Target
from layerskip_model.errors import UserError

PROMPTS = ["def anna_1(value):\n", "def bert"]


def test_decoding_from_python(finished_run: Path) -> None:
    target = load_target(str(finished_run / "export"), dtype="float64")
    generator = Generator.make(target, "self_speculative", exit_layer=2, num_speculations=4, max_new_tokens=9)
    generations = generator.generate(PROMPTS)
    assert [len(generation.tokens) for generation in generations] == [9, 9]
    plain = Generator.make(target, max_new_tokens=9).generate(PROMPTS)
    assert [one.tokens for one in generations] == [one.tokens for one in plain]
    assert generator.text(generations[0]) == target.tokenizer.decode(plain[0].tokens)


def test_generating_again_gives_the_same(tiny_target: Target) -> None:
    generator = Generator.make(
        tiny_target, "self_speculative", exit_layer=1, num_speculations=2, max_new_tokens=6
    )
    first = generator.generate(PROMPTS[:1])[0]
    generator.generate(PROMPTS[1:])
    assert generator.generate(PROMPTS[:1])[0].tokens == first.tokens


def test_an_exit_layer_without_speculation_exits_early(tiny_target: Target) -> None:
    def tokens(**settings: Any) -> list[int]:
        generator = Generator.make(tiny_target, "greedy", max_new_tokens=12, **settings)
        return generator.generate(PROMPTS[:1])[0].tokens

    assert tokens(exit_layer=4) == tokens() == tokens(exit_layer=None)
    model: Any = tiny_target.model
    import torch

    for exit_layer in (1, 2):
        text = tiny_target.encode(PROMPTS[0])
        for _ in range(12):
            states = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[
                exit_layer
            ]
            text.append(int(model.lm_head(model.model.norm(states[0, -1])).argmax()))
        assert tokens(exit_layer=exit_layer) == text[-12:]


def test_a_run_suggests_settings_and_flags_win(tiny_target: Target) -> None:
    assert tiny_target.run is not None
    suggested = tiny_target.run.suggested
    assert Generator.make(tiny_target, "self_speculative").settings == suggested
    assert Generator.make(tiny_target, "self_speculative", exit_layer=None).settings == suggested
    mixed = Generator.make(tiny_target, "self_speculative", exit_layer=3)
    assert mixed.settings == suggested | {"exit_layer": 3}
    assert Generator.make(tiny_target, "autoregressive").settings == {}


def test_stop_strings_end_a_generation(tiny_target: Target) -> None:
    free = Generator.make(tiny_target, max_new_tokens=30)
    text = free.text(free.generate(PROMPTS[:1])[0])
    word = text[8:11]
    for strategy in ("autoregressive", "self_speculative"):
        stopping = Generator.make(tiny_target, strategy, max_new_tokens=30, stop=["no such text", word])
        found = stopping.generate(PROMPTS[:1])[0]
        assert found.finish_reason == "stop"
        assert word in stopping.text(found)
        assert text.startswith(stopping.text(found))


@pytest.mark.parametrize(
    ("strategy", "fields", "message"),
    [
        ("self_speculative", {"max_new_tokens": 0}, "0: give 1 or more"),
        ("self_speculative", {"exit_layer": 0}, "exit_layer=0 is not valid"),
        ("autoregressive", {"num_speculations": 2}, "no setting 'num_speculations'"),
        ("autoregressive", {"stop": [""]}, "stop string ''"),
        ("telepathic", {}, "unknown strategy 'telepathic'"),
    ],
)
def test_mistakes_are_named(tiny_target: Target, strategy: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Generator.make(tiny_target, strategy, **fields)


def test_lines_are_answered_until_the_end(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "zq" * 200
    monkeypatch.setattr("sys.stdin", io.StringIO(f"def anna\n\n{long}\ndef bert"))
    interact(Generator.make(tiny_target, max_new_tokens=4))
    captured = capsys.readouterr()
    starts = [line[:7] for line in captured.err.splitlines()]
    assert starts == ["[4 toke", "error: ", "error: ", "[4 toke"]
    assert captured.out.startswith("def anna")
    assert "\ndef bert" in captured.out
