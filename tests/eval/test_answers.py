"""Exact match against a naive count, and speculation that changes no answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.answers import measure_answers, questions
from eval.target import Target
from layerskip_model.errors import UserError
from layerskip_model.jsonl import PromptRow, write_rows

PROMPTS = [
    "def anna_0(value):\n    return",
    "def bert_1(value):\n",
    "anna",
    "def chloé_2(value):\n    return value +",
]


@torch.no_grad()
def naive(target: Target, prompt: str, exit_layer: int, length: int) -> str:
    """Greedy decoding from an exit by whole forwards of the plain model."""
    model: Any = target.model
    ids = target.encode(prompt)
    start = len(ids)
    for _ in range(length):
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[exit_layer]
        normed = states if exit_layer == target.runner.num_layers else model.model.norm(states)
        ids = [*ids, int(model.lm_head(normed[0, -1]).argmax())]
        if ids[-1] in target.eos_token_ids:
            break
    return str(target.tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def rows(answers: list[str | None]) -> list[PromptRow]:
    return [
        PromptRow(prompt, answer, "file", i)
        for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]


def test_counts_what_a_naive_decoder_finds_right(tiny_target: Target) -> None:
    """The right answers are some that exits 2 and 4 give within the limit, and one that none gives."""
    target = tiny_target
    asked = questions(target, rows(["value", "x", "y", "1"]))
    limit = max(len(target.tokenizer(one.answer)["input_ids"]) for one in asked) + 8
    said = {e: [naive(target, prompt, e, limit) for prompt in PROMPTS] for e in range(1, 5)}
    right: list[str | None] = [said[2][0], said[4][0], said[2][2] or "x", "never said"]
    asked = questions(target, rows(right))
    longer = max(len(target.tokenizer(one.answer)["input_ids"]) for one in asked) + 8
    said = {e: [naive(target, prompt, e, longer) for prompt in PROMPTS] for e in range(1, 5)}
    found = measure_answers(target, asked, [1, 2, 3, 4], {"exit_layer": 1, "num_speculations": 3})
    assert [(a.strategy, a.settings.get("exit_layer")) for a in found] == [
        ("autoregressive", 4),
        ("autoregressive", 1),
        ("autoregressive", 2),
        ("autoregressive", 3),
        ("self_speculative", 1),
    ]
    for answer in found[:4]:
        texts = said[answer.settings["exit_layer"]]
        assert answer.right == sum(text == want for text, want in zip(texts, right, strict=True))
        assert answer.asked == 4
    assert (found[0].equal, found[4].equal) == (4, 4)
    assert found[4].right == found[0].right
    assert found[1].equal < 4


def test_right_answers_are_found_right(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an end-of-text token that soon comes, the last layer's own answers are all right."""
    first = [naive(tiny_target, prompt, 4, 1) for prompt in PROMPTS]
    ends = tuple(range(tiny_target.runner.vocab_size))  # every token ends an answer
    monkeypatch.setattr(Target, "eos_token_ids", property(lambda self: list(ends)))
    asked = questions(tiny_target, rows([text or "empty" for text in first]))
    found = measure_answers(tiny_target, asked, [], None)
    assert [(a.right, a.equal, a.asked) for a in found] == [(sum(map(bool, first)), 4, 4)]
    assert found[0].right >= 1


@pytest.mark.parametrize("answer", [None, "  \n"])
def test_a_row_without_an_answer_is_named(tiny_target: Target, answer: str | None) -> None:
    with pytest.raises(UserError, match=r"file:1: has no response, the right answer"):
        questions(tiny_target, rows(["a", answer, "b", "c"]))


def test_the_command(finished_run: Path, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    write_rows(data, [{"prompt": prompt, "response": "value"} for prompt in PROMPTS])
    command = [sys.executable, "-m", "eval", "answers", "--run", str(finished_run), "--dataset", str(data)]
    given = ["--exits", "1,2", "--exit_layer", "1", "--num_speculations", "2", "--dtype", "float64"]
    out = subprocess.run(
        [*command, *given, "--output_dir", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert "self speculative" in out.stdout
    written = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["strategy"] for row in written] == ["autoregressive"] * 3 + ["self_speculative"]
    assert written[-1]["equal"] == 4
    bad = subprocess.run([*command, "--exits", "two"], capture_output=True, text=True)
    assert (bad.returncode, bad.stderr) == (
        2,
        "error: --exits 'two': give whole numbers with commas between them, --exits 4,8\n",
    )
