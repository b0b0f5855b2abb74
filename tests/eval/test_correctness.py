"""`correctness`: equal token ids, ties and bugs, and the liars that it finds, through the real command too."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.correctness import Check, check_tokens
from eval.decoding.acceptance import Greedy, Outcome
from eval.decoding.cache import Cache
from eval.decoding.drafters.base import State
from eval.decoding.drafters.lookahead import Lookahead
from eval.decoding.drafters.self_speculative import SelfSpeculative
from eval.decoding.strategies import STRATEGIES
from eval.decoding.tree import Draft
from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_rows
from tests.eval.untrained import prompts_file, untrained
from tests.tiny_models import agreeing_model

TARGET = untrained(agreeing_model(layers=2, scale=0.2))
PROMPTS = ["defghij", "klm", "nopqrdefde"]
SETTINGS: dict[str, Any] = {"exit_layer": 2, "num_speculations": 3}
DEFAULT = [
    "self_speculative, exit_layer=2, num_speculations=3",
    "self_speculative, exit_layer=2, num_speculations=3, draft_stop=confidence",
    "self_speculative, exit_layer=2, num_speculations=3, draft_tree",
    "prompt_lookup, max_ngram=3, num_speculations=3",
    "lookahead",
]


def checked(place: Path, *strategies: str, **fields: Any) -> bool:
    check = Check(
        strategies or None,
        dataset=prompts_file(place, *PROMPTS),
        **{"max_steps": 16, "batch_size": 3, "settings": {} if strategies else SETTINGS, **fields},
    )
    return check_tokens(TARGET, check, place)


def differences(place: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(place / "differences.jsonl")]


def test_all_strategies_are_checked_and_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(tmp_path)
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0] == "autoregressive, by the model's own forward: 3 of 3 prompts equal"
    for line, title in zip(lines[1:], DEFAULT, strict=True):
        assert line.startswith(title)
        assert line.endswith(": 3 of 3 prompts equal")
    assert last == f"differences: {tmp_path / 'differences.jsonl'}"
    assert differences(tmp_path) == []


def test_sampled_tokens_are_compared_where_drafts_are_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(tmp_path, sample=True, choosing={"temperature": 0.8, "top_p": 0.9, "seed": 3})
    lines = capsys.readouterr().out.splitlines()[1:-1]
    drawn = [line for line in lines if line.endswith("--distribution checks it")]
    assert drawn == lines[:2]
    assert all(line.endswith(": 3 of 3 prompts equal") for line in lines[2:])


class WrongStates(SelfSpeculative):
    """Hands over each node's exit state with the node after it."""

    def propose(self, state: State) -> Draft:
        draft = super().propose(state)
        assert draft.hidden is not None
        return dataclasses.replace(draft, hidden=draft.hidden.roll(1, dims=1))


def wrong_bonus(patch: pytest.MonkeyPatch) -> None:
    """The target's own token is the second best after two drafts."""
    accept = Greedy.accept

    def wrong(self: Greedy, state: State, logits: Tensor, draft: Draft) -> Outcome:
        outcome = accept(self, state, logits, draft)
        for path, tokens, row in zip(outcome.path, outcome.tokens, logits, strict=True):
            if len(path) == 3:
                tokens[-1] = int(row[path[-1]].topk(2).indices[1])
        return outcome

    patch.setattr(Greedy, "accept", wrong)


def a_slot_too_few(patch: pytest.MonkeyPatch) -> None:
    """The last accepted draft is not kept in the cache."""
    keep = Cache.keep

    def wrong(self: Cache, path: list[list[int]], slot: Tensor | None = None) -> None:
        keep(self, [nodes[:-1] if len(nodes) > 1 else nodes for nodes in path], slot)

    patch.setattr(Cache, "keep", wrong)


def blind_window(patch: pytest.MonkeyPatch) -> None:
    """Guesses are verified though no node sees its ancestors."""
    propose = Lookahead.propose

    def wrong(self: Lookahead, state: State) -> Draft:
        draft = propose(self, state)
        own = torch.eye(draft.num_nodes, dtype=torch.bool).expand(state.batch, -1, -1)
        return dataclasses.replace(draft, visible=own, is_chain=False)

    patch.setattr(Lookahead, "propose", wrong)


LIARS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "wrong exit states": (
        "self_speculative:exit_layer=2:num_speculations=3",
        lambda patch: patch.setitem(STRATEGIES, "self_speculative", WrongStates),
    ),
    "a wrong bonus": ("self_speculative:draft_tree:exit_layer=2:num_speculations=3", wrong_bonus),
    "a slot too few": ("prompt_lookup", a_slot_too_few),
    "no ancestors": ("lookahead", blind_window),
}


@pytest.mark.parametrize("lie", LIARS)
def test_a_liar_is_found(
    lie: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry, plant = LIARS[lie]
    plant(monkeypatch)
    assert not checked(tmp_path, entry)
    rows = differences(tmp_path)
    assert {row["verdict"] for row in rows} == {"bug"}
    assert all(row["strategy"].startswith(entry.split(":")[0]) for row in rows)
    *_, summary = (line for line in capsys.readouterr().out.splitlines() if "prompts equal" in line)
    assert summary.endswith(f"{3 - len(rows)} of 3 prompts equal, {len(rows)} bug" + "s" * (len(rows) > 1))


def test_a_baseline_that_lies_is_found_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What all strategies share cannot hide: transformers' own forward judges plain decoding."""
    accept = Greedy.accept

    def wrong(self: Greedy, state: State, logits: Tensor, draft: Draft) -> Outcome:
        return accept(self, state, logits - 20 * torch.nn.functional.one_hot(logits.argmax(-1), 64), draft)

    monkeypatch.setattr(Greedy, "accept", wrong)
    assert not checked(tmp_path, "prompt_lookup")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "autoregressive, by the model's own forward: 0 of 3 prompts equal, 3 bugs"
    row = differences(tmp_path)[0]
    assert row["source"] == "prompts:1"
    assert row["position"] == 0
    assert row["expected"] != row["got"]
    assert row["got_text"] == TARGET.tokenizer.decode([row["got"]])
    assert row["gap"] > 0.01
    told = f"  prompt 0 (prompts:1), token 0: {row['got_text']!r} ({row['got']}) in place of "
    assert lines[1].startswith(told)
    assert lines[1].endswith(f"({row['expected']}), gap {row['gap']:.2g}: bug")


@pytest.mark.parametrize(
    ("strategies", "fields", "message"),
    [
        (["hf_generate"], {}, "'hf_generate': is transformers' own; only ours are checked here"),
        (["greedy"], {}, "nothing to compare with autoregressive"),
        (["lookahaed"], {}, "did you mean 'lookahead'"),
        (["lookahead"], {"settings": SETTINGS}, "--exit_layer 2: none of the --strategies takes it"),
        ([], {"choosing": {"acceptance": "typical"}}, "typical is not lossless"),
        ([], {"choosing": {"top_k": 3}}, "--top_k 3 is for sampling"),
        ([], {"max_steps": 0}, "--max_steps 0: give 1 or more"),
        ([], {"num_samples": 4}, "the dataset has only 3 prompts"),
    ],
)
def test_mistakes_are_named(
    strategies: list[str], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        checked(tmp_path, *strategies, **fields)


SCRIPT = """
from dataclasses import replace

from eval.__main__ import app
from eval.decoding.drafters.self_speculative import SelfSpeculative
from eval.decoding.strategies import STRATEGIES
from layerskip_model.command_line import run_app


class Liar(SelfSpeculative):
    def propose(self, state):
        draft = super().propose(state)
        if draft.q is not None:
            return replace(draft, q=draft.q.sqrt())
        return replace(draft, hidden=-draft.hidden)


STRATEGIES["liar"] = Liar
run_app(app, "python -m eval")
"""


def test_the_command_finds_the_liar(finished_run: Path, tmp_path: Path) -> None:
    """A user's own strategy beside ours, greedily and by distribution, in processes of their own."""
    (tmp_path / "liar.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "liar.py"), "correctness", "--run", str(finished_run)]
    command += ["--exit_layer", "2", "--num_speculations", "3"]
    both = ["--strategies", "self_speculative, liar"]
    greedy = ["--num_samples", "2", "--max_steps", "8", "--dtype", "float64"]
    calls = {
        "greedy": [*both, *greedy, "--output_dir", str(tmp_path / "out")],
        "honest": ["--strategies", "self_speculative", *greedy],
        "drawn": [*both, "--distribution", "--draws", "3000", "--top_k", "8"],
    }
    processes = {
        name: subprocess.Popen(
            [*command, *call],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
        for name, call in calls.items()
    }
    done = {name: (*process.communicate(), process.returncode) for name, process in processes.items()}
    out, err, status = done["greedy"]
    assert (status, err) == (1, "")
    assert "self_speculative, exit_layer=2, num_speculations=3: 2 of 2 prompts equal\n" in out
    assert "liar, exit_layer=2, num_speculations=3: 0 of 2 prompts equal, 2 bugs\n" in out
    assert len(differences(tmp_path / "out")) == 2
    assert done["honest"][1:] == ("", 0)
    out, err, status = done["drawn"]
    assert (status, err) == (1, "")
    verdicts = [line.split(": ")[-1] for line in out.splitlines()[1:]]
    assert verdicts == ["follows", "follows", "bug"]
