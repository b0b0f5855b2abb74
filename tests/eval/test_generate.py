"""Decoding prompts with a strategy, from Python and line by line."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval import Generator, load_target
from eval.choosing import Choosing
from eval.decoding.speculate import Generation
from eval.generate import interact
from eval.target import Target
from layerskip_model.errors import UserError
from tests.eval.screen import Screen, ScreenFile, pictures, shown
from tests.eval.tiny_tokenizers import TOKENIZERS, tokens_named

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


def test_the_text_after_a_prompt_keeps_its_space(tiny_target: Target) -> None:
    tokenizer = TOKENIZERS["fallback"]
    generator = Generator(replace(tiny_target, tokenizer=tokenizer), "autoregressive", {}, 1)
    generation = Generation(tokens_named(tokenizer, "▁a", "▁a"))
    assert generator.text(generation, "b") == " a a"
    assert generator.text(generation) == "a a"


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


def test_what_is_not_lossless_says_so_and_a_tree_has_no_rate(tiny_target: Target) -> None:
    def cost(choosing: Choosing, **settings: Any) -> str:
        drafting = {"exit_layer": 1, "num_speculations": 2, **settings}
        generator = Generator.make(
            tiny_target, "self_speculative", max_new_tokens=12, choosing=choosing, **drafting
        )
        return generator.cost(generator.generate(PROMPTS))

    chain, tree = cost(Choosing()), cost(Choosing(), draft_tree=True)
    assert "acceptance rate" in chain
    assert "acceptance rate" not in tree
    assert "acceptance length" in chain
    assert "acceptance length" in tree
    typical = cost(Choosing(True, acceptance="typical", temperature=0.8))
    assert "not lossless" in typical
    assert "temperature 0.8" in typical
    assert "not lossless" not in cost(Choosing(True))


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


def speculating(target: Target, **settings: Any) -> Generator:
    """One that draws: then half the drafts are wrong, and the text has half characters and control codes."""
    choosing = Choosing(sample=True, temperature=1.0)
    given = {"exit_layer": 1, "num_speculations": 4, "max_new_tokens": 40, "choosing": choosing, **settings}
    return Generator.make(target, "self_speculative", **given)


def answers(generator: Generator, prompts: list[str]) -> list[str]:
    """The prompts with their continuations, each decoded by itself."""
    return [
        prompt + generator.text(generator.generate([prompt], streams=[stream])[0], prompt)
        for stream, prompt in enumerate(prompts)
    ]


def test_a_bad_line_does_not_spoil_the_next(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bytes_of_lines = io.BytesIO(b"\xff\xfe\ndef anna")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(bytes_of_lines, encoding="utf-8"))
    interact(Generator.make(tiny_target, max_new_tokens=4))
    captured = capsys.readouterr()
    assert captured.out.startswith("def anna")
    assert captured.err.startswith("error: prompt '\\udcff\\udcfe': is not valid UTF-8")


@pytest.mark.parametrize("sample", [True, False])
def test_what_is_printed_piece_by_piece_is_the_text(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch, sample: bool
) -> None:
    written: list[str] = []
    monkeypatch.setattr("eval.terminal.Output._put", lambda _, text: written.append(text))
    generator = speculating(tiny_target, **({} if sample else {"choosing": None}))
    generator.show(["def chlo"])
    assert "".join(written) == answers(generator, ["def chlo"])[0] + "\n"
    assert len(written) > 5
    whole = tiny_target.tokenizer.decode(generator.generate(["def chlo"])[0].tokens, skip_special_tokens=True)
    assert "".join(written) == f"def chlo{whole}\n"


def test_several_prompts_in_a_pipe_are_json_lines(
    tiny_target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = speculating(tiny_target, stop=["\n\n"])
    generator.show(PROMPTS)
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["prompt"] + row["text"] for row in rows] == answers(generator, PROMPTS)
    assert [row["finish_reason"] for row in rows] == [
        one.finish_reason for one in generator.generate(PROMPTS)
    ]
    assert re.fullmatch(
        r"\[2 prompts, \d+ tokens, [\d.]+ tokens/s, acceptance rate [\d.]+, acceptance length [\d.]+, "
        r"sampled with temperature 1\.0, top_k 0, top_p 1\.0, seed 0, ended by .*\]\n",
        captured.err,
    )


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> ScreenFile:
    """A terminal to put in place of standard output."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return ScreenFile(Screen(30, 6))


def test_several_prompts_on_a_terminal_stand_one_after_another(
    tiny_target: Target, screen: ScreenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", screen)
    generator = speculating(tiny_target)
    generator.show(PROMPTS)
    expected = "".join(
        f"── {number} of 2 ".ljust(30, "─") + f"\n{answer}\n"
        for number, answer in enumerate(answers(generator, PROMPTS), start=1)
    )
    assert screen.screen.characters == shown([pictures(expected)], 30, 6).characters
    assert "\x1b7" in screen.written


def test_an_interruption_leaves_the_text_so_far(
    tiny_target: Target, screen: ScreenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", screen)

    def interrupt(tokens: list[int]) -> bool:
        if len(tokens) > 9 and screen.screen.coloured("cyan"):
            raise KeyboardInterrupt
        return False

    generator = speculating(tiny_target)
    (answer,) = answers(generator, PROMPTS[:1])
    with pytest.raises(KeyboardInterrupt):
        replace(generator, stop=interrupt).show(PROMPTS[:1])
    left = screen.screen
    assert left.coloured("cyan") == ""
    assert (left.colour, left.column) == ("", 0)
    assert shown([pictures(answer)], 30, 6).text.startswith(left.text)
    assert len(left.text) > len(PROMPTS[0])


def test_a_refused_prompt_prints_nothing(
    tiny_target: Target, screen: ScreenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", screen)
    for prompts in (["zq" * 200], ["def", "zq" * 200]):
        with pytest.raises(UserError, match="the model's context is 128"):
            speculating(tiny_target).show(prompts)
    assert screen.written == ""


def test_a_real_terminal(finished_run: Path, tiny_target: Target) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (8, 25))
    command = [sys.executable, "-m", "eval", "generate", "--run", str(finished_run), "--dtype", "float64"]
    command += ["--generation_strategy", "self_speculative", "--exit_layer", "1", "--num_speculations", "4"]
    command += ["--sample", "True"]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {
        "TERM": "xterm"
    }
    process = subprocess.Popen(
        [*command, "--max_steps", "40", "--prompt", PROMPTS[0]],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(theirs)
    raw = b""
    try:
        while block := os.read(ours, 4096):
            raw += block
    except OSError:  # how a pty ends
        pass
    os.close(ours)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert errors.startswith(b"[40 tokens")
    generator = speculating(tiny_target)
    (answer,) = answers(generator, PROMPTS[:1])
    screen = Screen(25, 8).feed(raw.decode())
    assert screen.characters == shown([pictures(answer), "\n"], 25, 8).characters
    assert raw.count(b"\x1b7") > 3
    assert screen.coloured("cyan") == ""
    assert screen.coloured("green").strip()


def test_sampling_draws_from_the_stream_that_it_is_told(tiny_target: Target) -> None:
    choosing = Choosing(sample=True, temperature=0.9, seed=3)
    strategies: dict[str, dict[str, Any]] = {"autoregressive": {}, "self_speculative": {"exit_layer": 2}}
    for strategy, settings in strategies.items():
        generator = Generator.make(tiny_target, strategy, max_new_tokens=20, choosing=choosing, **settings)
        first, second = (one.tokens for one in generator.generate([PROMPTS[0]] * 2))
        assert first != second
        (again,) = generator.generate(PROMPTS[:1], streams=[1])
        assert again.tokens == second
        other = replace(generator, choosing=replace(choosing, seed=4)).generate(PROMPTS[:1])
        assert other[0].tokens != first


def test_every_line_that_is_read_has_its_own_stream(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = Generator.make(
        tiny_target, max_new_tokens=20, choosing=Choosing(sample=True, temperature=0.9, top_k=40)
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("def anna\ndef anna\n"))
    interact(generator)
    captured = capsys.readouterr()
    two = generator.generate(["def anna"] * 2)
    assert captured.out == "".join(f"def anna{generator.text(one, 'def anna')}\n" for one in two)
    assert two[0].tokens != two[1].tokens
    assert captured.err.count("sampled with temperature 0.9, top_k 40, top_p 1.0, seed 0, ended by") == 2
