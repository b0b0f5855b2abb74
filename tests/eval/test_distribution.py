"""The chi-square check: its arithmetic against naive twins, and the liars that it finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.correctness import Check
from eval.decoding import sampling
from eval.decoding.drafters.base import State
from eval.decoding.drafters.self_speculative import SelfSpeculative
from eval.decoding.strategies import STRATEGIES
from eval.decoding.tree import Draft
from eval.distribution import (
    Fit,
    cell_of,
    check_distribution,
    fitted,
    pearson,
    text_probabilities,
)
from eval.target import Target
from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_rows
from tests.eval.decoding.sampled import PROMPT, VOCABULARY, naive_distribution, sampled_model
from tests.eval.untrained import prompts_file, untrained

TARGET = untrained(sampled_model())
SETTINGS = {"exit_layer": 1, "num_speculations": 2}


def naive_pearson(observed: list[float], expected: list[float]) -> tuple[float, int]:
    cells = [[o, e] for o, e in zip(observed, expected, strict=True) if e >= 5]
    rest = [
        sum(o for o, e in zip(observed, expected, strict=True) if e < 5),
        sum(e for e in expected if e < 5),
    ]
    if rest[1] >= 5:
        cells.append(rest)
    else:
        smallest = min(cells, key=lambda cell: cell[1])
        smallest[0] += rest[0]
        smallest[1] += rest[1]
    return sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1


@pytest.mark.parametrize(
    "expected", [[10.0, 20.0, 30.0], [10.0, 3.0, 1.0, 0.0], [50.0, 7.0, 2.0, 2.0, 2.0], [5.0, 4.9]]
)
def test_pearsons_statistic(expected: list[float]) -> None:
    observed = [round(e) + (-1.0) ** i for i, e in enumerate(expected)]
    fit = pearson(torch.tensor(observed), torch.tensor(expected, dtype=torch.float64))
    statistic, freedom = naive_pearson(observed, expected)
    assert (fit.statistic, fit.freedom) == (pytest.approx(statistic), freedom)


def test_p_values_are_those_of_the_tables() -> None:
    assert Fit(3.841, 1).p_value == pytest.approx(0.05, abs=1e-4)
    assert Fit(11.070, 5).p_value == pytest.approx(0.05, abs=1e-4)
    assert (Fit(3.0, 2) + Fit(8.070, 3)).p_value == pytest.approx(0.05, abs=1e-4)
    assert Fit(0.0, 0).p_value == 1.0


@pytest.mark.parametrize("eos", [[], [2]])
@pytest.mark.parametrize("draws", [300, 3000])
def test_cells_have_the_probability_of_their_texts(
    eos: list[int], draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text of three tokens, one by one."""
    monkeypatch.setattr(Target, "eos_token_ids", eos)
    monkeypatch.setattr("eval.distribution.BUDGET", 4000)  # in several batches
    check = Check(["prompt_lookup"], sample=True, choosing={"temperature": 0.7, "top_k": 5})
    cells = text_probabilities(TARGET, check, PROMPT, 3, draws)
    expected = dict.fromkeys(cells, 0.0)
    for text in product(range(VOCABULARY), repeat=3):
        ends = [place + 1 for place, token in enumerate(text) if token in eos]
        probability = 1.0
        for place, token in enumerate(text):
            tokens = torch.tensor([[*PROMPT, *text[:place]]])
            with torch.inference_mode():
                logits = TARGET.model(input_ids=tokens).logits[:, -1].double()
            probability *= float(naive_distribution(logits, {"temperature": 0.7, "top_k": 5})[0, token])
        expected[cell_of(text[: min(ends, default=3)], cells)] += probability
    assert cells == pytest.approx(expected)
    assert 10 < len(cells) < VOCABULARY**3
    deepest = [cells[text] for text in cells if len(text) == 3]
    assert min(deepest) * draws >= 5


def test_texts_are_counted_in_their_cells() -> None:
    """Two cells, and what is in neither."""
    cells = {(): 0.2, (1,): 0.5, (2, 3): 0.3}
    texts = [(1, 4)] * 50 + [(2, 3)] * 30 + [(2, 4)] * 20
    assert fitted(cells, texts) == Fit(0.0, 2)
    assert fitted(cells, [(2, 3)] * 100).p_value < 1e-9


def outcome(place: Path, *strategies: str, draws: int = 6000, tokens: int = 4, **fields: object) -> bool:
    check = Check(
        strategies or None,
        dataset=prompts_file(place, "dbebf"),
        sample=True,
        settings={} if "prompt_lookup" in strategies else SETTINGS,
        choosing={"temperature": 0.7, "top_k": 5, **fields},
    )
    return check_distribution(TARGET, check, draws, tokens, place)


def test_every_strategy_follows_the_models_own_distribution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(tmp_path, draws=3000)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == [
        "autoregressive",
        "self_speculative, exit_layer=1, num_speculations=2",
        "self_speculative, exit_layer=1, num_speculations=2, draft_stop=confidence, stop_threshold=0.75",
        "self_speculative, exit_layer=1, num_speculations=2, draft_tree, tree_top_k=2, tree_tokens=4",
        "prompt_lookup, max_ngram=3, num_speculations=2",
    ]
    rows = [row for _, row in read_rows(tmp_path / "distribution.jsonl")]
    assert all(row["verdict"] == "follows" and row["p_value"] > 1e-4 for row in rows)
    assert all(0 < row["accepted"] < row["drafted"] for row in rows[1:])
    assert all(row["cells"] == row["freedom"] + 1 > 50 for row in rows)


class WrongQ(SelfSpeculative):
    """Hands over another distribution than its drafts were drawn from."""

    def propose(self, state: State) -> Draft:
        draft = super().propose(state)
        q = None if draft.q is None else draft.q.sqrt()
        return dataclasses.replace(draft, q=q)


class WrongStates(SelfSpeculative):
    """Hands over each node's exit state with the node after it."""

    def propose(self, state: State) -> Draft:
        draft = super().propose(state)
        assert draft.hidden is not None
        return dataclasses.replace(draft, hidden=draft.hidden.roll(1, dims=1))


class WrongOrder(SelfSpeculative):
    """Hands over its drafts from the last to the first."""

    def propose(self, state: State) -> Draft:
        draft = super().propose(state)
        return dataclasses.replace(draft, tokens=draft.tokens.flip(1).roll(1, dims=1))


def always(p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape)


Plant = Callable[[pytest.MonkeyPatch], None]
LIARS: dict[str, Plant] = {
    "a wrong q": lambda patch: patch.setitem(STRATEGIES, "self_speculative", WrongQ),
    "wrong exit states": lambda patch: patch.setitem(STRATEGIES, "self_speculative", WrongStates),
    "drafts in the wrong order": lambda patch: patch.setitem(STRATEGIES, "self_speculative", WrongOrder),
    "drafts that are always accepted": lambda patch: patch.setattr(sampling, "acceptance", always),
    "one number for two things": lambda patch: patch.setattr(sampling, "ACCEPT", sampling.DRAFT),
    "no residual": lambda patch: patch.setattr(sampling, "residual", lambda p, q: p),
}


@pytest.mark.parametrize("lie", LIARS)
def test_a_liar_is_found(lie: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LIARS[lie](monkeypatch)
    assert not outcome(tmp_path, "self_speculative")
    plain, liar = (row for _, row in read_rows(tmp_path / "distribution.jsonl"))
    assert (plain["verdict"], liar["verdict"]) == ("follows", "bug")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draws": 10}, "--draws 10: give 1000 or more"),
        ({"tokens": 0}, "--tokens 0: give 1 or more"),
        ({"temperature": 1e-4}, "the model is sure of one text"),
        ({"acceptance": "typical"}, "--acceptance typical is not lossless"),
    ],
)
def test_what_cannot_be_tested_is_refused(fields: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        outcome(tmp_path, "prompt_lookup", **fields)  # type: ignore[arg-type]
