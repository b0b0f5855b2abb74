"""Lookahead: lossless, and its window is what separate passes over each of its tokens' texts make of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.decoding.acceptance import Greedy, Rule
from eval.decoding.drafters.base import State
from eval.decoding.drafters.lookahead import Layout, Lookahead, Window
from eval.decoding.sampling import OWN, Sampling, gumbel_noise, random_numbers
from eval.decoding.shaping import Shaping
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from eval.decoding.tree import Draft
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.eval.decoding.sampled import (
    DECISIVE,
    LOWEST,
    draws,
    p_value,
    sampled_model,
    sampling,
    text_probabilities,
)
from tests.eval.decoding.test_speculate import PROMPTS, naive_greedy
from tests.tiny_models import tiny_model

Plant = Callable[[pytest.MonkeyPatch], None]

MODEL = tiny_model(vocab_size=12)  # few tokens, so that it soon repeats itself
RUNNER = Runner(MODEL)
TEXTS = [[token % 12 for token in prompt] for prompt in PROMPTS]
NEW = 24
TEMPERATURE = 0.5
EXPECTED = [naive_greedy(MODEL, prompt, NEW + 8) for prompt in TEXTS]
SIZES = [(3, 4, 2), (1, 2, 1), (4, 2, 3), (2, 5, 1), (5, 3, 4)]  # window, level, guess_set
SAMPLED = Runner(sampled_model())
SETTINGS = {"temperature": 0.7, "top_k": 5}
SMALL = {"window": 2, "level": 3, "guess_set": 1}


def settings_of(sizes: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("window", "level", "guess_set"), sizes, strict=True))


def run(
    prompts: list[list[int]], sizes: tuple[int, int, int], runner: Runner = RUNNER, **options: Any
) -> list[Generation]:
    options = {"max_new_tokens": NEW, "eos_token_ids": (), **options}
    return decode(runner, make_drafter("lookahead", runner, **settings_of(sizes)), prompts, **options)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_greedy_is_lossless_alone_and_in_a_batch(sizes: tuple[int, int, int]) -> None:
    together = run(TEXTS, sizes)
    assert [row.tokens for row in together] == [tokens[:NEW] for tokens in EXPECTED]
    for row, prompt in zip(together, TEXTS, strict=True):
        alone = run([prompt], sizes)[0]
        assert (alone.tokens, alone.accepted_lengths) == (row.tokens, row.accepted_lengths)
        assert sum(row.accepted_lengths) == NEW - 1  # no draft goes beyond the room
    assert any(length > 1 for row in together for length in row.accepted_lengths)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3"])
def test_windows_and_odd_attention(kind: str) -> None:
    runner = Runner(tiny_model(kind, vocab_size=12))
    expected = [naive_greedy(runner.model, prompt, NEW) for prompt in TEXTS]
    assert [row.tokens for row in run(TEXTS, (3, 4, 3), runner)] == expected


def test_rows_that_end_early_and_the_end_of_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    eos = EXPECTED[1][3]
    rows = run(TEXTS, (3, 4, 2), eos_token_ids=[eos])
    for row, whole in zip(rows, EXPECTED, strict=True):
        cut = whole.index(eos) + 1 if eos in whole[:NEW] else NEW
        assert row.tokens == whole[:cut]
    monkeypatch.setattr(RUNNER, "context_length", 14)
    rows = run(TEXTS, (4, 5, 3))
    assert [row.finish_reason for row in rows] == ["context"] * 3
    for row, prompt, whole in zip(rows, TEXTS, EXPECTED, strict=True):
        assert row.tokens == whole[: 14 - len(prompt)]


@dataclass
class Step:
    """One step as the twin has it, or as the drafter does."""

    tried: set[tuple[int, ...]]
    levels: list[list[int]]
    won: int = 0


def likeliest(logits: Tensor, place: int) -> int:
    return int(logits.argmax())


def drawn(logits: Tensor, place: int) -> int:
    """What sampling says at a place of the new text, on stream 0 of seed 0."""
    number = random_numbers(0, [0], place + 1)[0, place, OWN]
    return int((logits / TEMPERATURE + gumbel_noise(torch.tensor(number), logits)).argmax())


CHOICES: dict[str, tuple[Callable[[Tensor, int], int], Rule]] = {
    "greedy": (likeliest, Greedy()),
    "sampled": (drawn, Sampling(Shaping({"temperature": TEMPERATURE}, (), 12), seed=0)),
}


def naive_next(text: list[int], ahead: list[int], prompt: list[int], kind: str) -> int:
    """What the model says after a text and some guesses, by a pass over nothing else."""
    with torch.inference_mode():
        logits = MODEL(input_ids=torch.tensor([text + ahead])).logits[0, -1]
    return CHOICES[kind][0](logits, len(text) + len(ahead) - len(prompt))


def naive_steps(prompt: list[int], sizes: tuple[int, int, int], kind: str) -> list[Step]:
    """Lookahead without tree, mask or cache: a pass for every token of the last level, a list for a pool."""
    width, n, tries = sizes
    text = [*prompt, naive_next(prompt, [], prompt, kind)]
    again = (prompt * width * n)[-(width + n - 2) :]
    levels = [[again[level + column] for column in range(width)] for level in range(n - 1)]
    pool: list[list[int]] = []
    known = 0  # tokens of the text whose n-grams are in the pool
    steps = []
    while (room := len(prompt) + NEW - len(text)) > 0:
        levels[0][0] = text[-1]
        pool += [text[end - n : end] for end in range(max(n, known + 1), len(text) + 1)]
        known = len(text)
        fitting = [tuple(gram[1:]) for gram in reversed(pool) if gram[0] == text[-1]]
        tried = {guess[: room - 1] for guess in list(dict.fromkeys(fitting))[:tries]}
        steps.append(Step(leaves(tried), [list(level) for level in levels]))
        newest = []
        for column in range(width):
            ahead = levels[0][1 : column + 1] + [level[column] for level in levels[1:]]
            newest.append(naive_next(text, ahead, prompt, kind))
        pool += [list(gram) for gram in zip(*levels, newest, strict=True)]
        levels = [*levels[1:], newest]
        truth: list[int] = []
        while not truth or any(guess[: len(truth)] == tuple(truth) for guess in tried):
            truth.append(naive_next(text, truth, prompt, kind))
        steps[-1].won = len(truth)
        text += truth
    return steps


def leaves(paths: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Those that no other one goes on from."""
    return {
        path for path in paths if path and not any(path == other[: len(path)] for other in paths - {path})
    }


def drafted_steps(prompt: list[int], sizes: tuple[int, int, int], kind: str) -> list[Step]:
    """The same of the real drafter; what is tried is read from its drafts."""
    steps: list[Step] = []

    class Recording(Lookahead):
        def propose(self, state: State) -> Draft:
            draft = super().propose(state)
            tokens = draft.tokens[0].tolist()
            paths: list[tuple[int, ...]] = [()]
            for node, parent in enumerate(draft.parents[0].tolist()[1:], start=1):
                paths.append((*paths[parent], tokens[node]))
            tried = (draft.valid & draft.candidate)[0].tolist()
            up = {path for path, ok in zip(paths, tried, strict=True) if ok}
            steps.append(Step(leaves(up), [list(level) for level in self._windows[0].levels]))
            return draft

    drafter = Recording(RUNNER, Lookahead.Settings(**settings_of(sizes)))
    rule = CHOICES[kind][1]
    row = decode(RUNNER, drafter, [prompt], max_new_tokens=NEW, eos_token_ids=(), rule=rule)[0]
    for step, won in zip(steps, row.accepted_lengths, strict=True):
        step.won = won
    return steps


def twins_agree(sizes: tuple[int, int, int] = (3, 4, 2), kind: str = "greedy") -> bool:
    """Every step of every prompt: the same guesses, the same window, as many tokens won."""
    return all(naive_steps(prompt, sizes, kind) == drafted_steps(prompt, sizes, kind) for prompt in TEXTS)


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_step_is_that_of_the_naive_twin(sizes: tuple[int, int, int], kind: str) -> None:
    assert twins_agree(sizes, kind)
    steps = [step for prompt in TEXTS for step in drafted_steps(prompt, sizes, kind)]
    assert {step.won for step in steps} >= {1, 2}
    assert any(step.tried for step in steps)


def layout_with(change: Callable[[Layout], dict[str, Any]]) -> Plant:
    """The nodes stand elsewhere, or see something else, than they should."""
    make = Layout.make

    def wrong(settings: Any, guesses: int, device: torch.device) -> Layout:
        layout = make(settings, guesses, device)
        return replace(layout, **change(layout))

    return lambda patch: patch.setattr(Layout, "make", wrong)


def remember(change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Plant:
    """Another n-gram goes into the pool."""
    original = Window._remember
    return lambda patch: patch.setattr(Window, "_remember", lambda self, gram: original(self, change(gram)))


def oldest_level_stays(patch: pytest.MonkeyPatch) -> None:
    """The newest level takes the place of the last one, not of the oldest."""
    advance = Window.advance

    def wrong(self: Window, newest: list[int]) -> None:
        levels = [*self.levels[:-1], newest]
        advance(self, newest)
        self.levels = levels

    patch.setattr(Window, "advance", wrong)


WINDOW_BUGS: dict[str, Plant] = {
    "columns see each other": layout_with(
        lambda layout: {"visible": layout.visible | (~layout.candidate[:, None] & ~layout.candidate).tril()}
    ),
    "the window sees the guesses": layout_with(
        lambda layout: {"visible": layout.visible | (~layout.candidate[:, None] & layout.candidate)}
    ),
    "the window stands one place too far": layout_with(
        lambda layout: {"depth": layout.depth + ~layout.candidate}
    ),
    "n-grams are known by their second token": remember(lambda gram: (gram[1], *gram[1:])),
    "the oldest level stays": oldest_level_stays,
}
GUESS_BUGS: dict[str, Plant] = {
    "a guess sees the others": layout_with(
        lambda layout: {"visible": layout.visible | (layout.candidate[:, None] & layout.candidate).tril()}
    ),
    "a guess sees the window": layout_with(
        lambda layout: {"visible": layout.visible | (layout.candidate[:, None] & ~layout.candidate)}
    ),
    "guesses stand one place too far": layout_with(
        lambda layout: {"depth": layout.depth + (layout.candidate & (layout.depth > 0))}
    ),
    "every guess begins at the end of the one before": layout_with(
        lambda layout: {"parents": layout.parents.where(layout.depth != 1, layout.node - 1)}
    ),
}


@pytest.mark.parametrize("bug", WINDOW_BUGS)
def test_the_twin_reports(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost speed alone, so that the output says nothing of them."""
    WINDOW_BUGS[bug](monkeypatch)
    assert not twins_agree()


@pytest.mark.parametrize("bug", GUESS_BUGS)
def test_greedy_equality_reports(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    GUESS_BUGS[bug](monkeypatch)
    assert [row.tokens for row in run(TEXTS, (4, 4, 3))] != [tokens[:NEW] for tokens in EXPECTED]


def test_samples_follow_the_models_distribution_token_by_token() -> None:
    """They are what autoregressive sampling draws from the same stream, so one is as good as the other."""
    tokens = draws(SAMPLED, "lookahead", sampling(SETTINGS), **SMALL)
    assert p_value(tokens, text_probabilities(SAMPLED.model, SETTINGS)) > LOWEST
    assert torch.equal(tokens, draws(SAMPLED, "autoregressive", sampling(SETTINGS)))


def test_the_chi_square_reports_a_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    GUESS_BUGS["guesses stand one place too far"](monkeypatch)
    tokens = draws(SAMPLED, "lookahead", sampling(SETTINGS), **SMALL)
    assert p_value(tokens, text_probabilities(SAMPLED.model, SETTINGS)) < DECISIVE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": 1}, "lookahead: level=1 is not valid; give a whole number of 2 or more"),
        ({"window": 0}, "lookahead: window=0 is not valid; give a whole number of 1 or more"),
        ({"guess_set": 0}, "lookahead: guess_set=0 is not valid; give a whole number of 1 or more"),
    ],
)
def test_mistakes_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_drafter("lookahead", RUNNER, **settings)
    assert str(caught.value) == message


def test_the_command_line(finished_run: Path) -> None:
    command = [sys.executable, "-m", "eval", "generate", "--run", str(finished_run), "--dtype", "float64"]
    command += ["--prompt", "def anna_1(value):", "--max_steps", "12"]
    flags = ["--generation_strategy", "lookahead", "--window", "3", "--level", "4", "--guess_set", "2"]
    outputs = [
        subprocess.run([*command, *more], capture_output=True, text=True, check=True) for more in (flags, [])
    ]
    assert outputs[0].stdout == outputs[1].stdout
    assert "acceptance length" in outputs[0].stderr
