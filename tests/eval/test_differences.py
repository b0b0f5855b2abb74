"""Ties and bugs: whether rounding explains where an output leaves the baseline's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from eval.choosing import Choosing, make_rule
from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.differences import Examiner, likeliest_gap, next_logits
from tests.eval.untrained import untrained
from tests.tiny_models import tiny_model

TEXT = [3, 9, 4, 11, 7, 2]


def examiner(dtype: torch.dtype, **tied: tuple[int, int, float]) -> tuple[Examiner, Any]:
    """An examiner of a tiny model; `tied=(i, j, d)` gives token j token i's row of the head, off by d."""
    model = tiny_model(dtype=torch.float64)
    if tied:
        first, second, distance = tied["tied"]
        weight = model.get_output_embeddings().weight.data
        weight[second] = weight[first] * (1 - distance)
    model.to(dtype)  # type: ignore[arg-type]
    return Examiner(untrained(model)), model


def ranked(model: Any) -> tuple[list[int], torch.Tensor]:
    logits = next_logits(model, TEXT)
    return logits.argsort(descending=True).tolist(), logits


def test_equal_outputs_have_no_difference() -> None:
    judge, _ = examiner(torch.float32)
    assert judge.compare(TEXT, [1, 2], [1, 2]) is None
    assert judge.compare(TEXT, [], []) is None
    assert "_judge" not in vars(judge)  # no copy of the model is made for nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("swapped", [False, True])
def test_tokens_that_rounding_decides_between_are_a_tie(dtype: torch.dtype, swapped: bool) -> None:
    _, plain = examiner(dtype)
    best = ranked(plain)[0][0]
    other = (best + 1) % 64
    judge, _ = examiner(dtype, tied=(best, other, torch.finfo(dtype).eps / 4))
    pair = (other, best) if swapped else (best, other)
    found = judge.compare(TEXT[:4], [TEXT[4], TEXT[5], pair[0], 8], [TEXT[4], TEXT[5], pair[1]])
    assert found is not None
    assert (found.position, found.expected, found.got, found.verdict) == (2, *pair, "tie")
    assert found.gap is not None
    assert found.gap < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_clearly_worse_token_is_a_bug(dtype: torch.dtype) -> None:
    judge, model = examiner(dtype)
    order, _ = ranked(model)
    exact, logits = ranked(copy.deepcopy(model).double())
    assert order[0] == exact[0]
    for rank in (2, 5, 63):
        gap = float(logits[exact[0]] - logits[exact[rank]])
        assert gap > 1.0  # well above what bfloat16 does to these logits
        found = judge.compare(TEXT, [exact[0]], [exact[rank]])
        assert found is not None
        assert found.verdict == "bug"
        assert found.gap == pytest.approx(gap, abs=1e-4)
        turned = judge.compare(TEXT, [exact[rank]], [exact[0]])  # the baseline may be the wrong one
        assert turned is not None
        assert (turned.verdict, turned.gap) == ("bug", found.gap)


def test_the_replay_is_exact_though_the_target_rounds() -> None:
    judge, model = examiner(torch.bfloat16)
    exact, logits = ranked(copy.deepcopy(model).double())
    found = judge.compare(TEXT, [exact[0]], [exact[1]])
    assert found is not None
    assert found.gap == pytest.approx(float(logits[exact[0]] - logits[exact[1]]), abs=1e-6)


@pytest.mark.parametrize(
    ("expected", "got", "position"), [([5, 6, 7], [5, 6], 2), ([5], [5, 6], 1), ([], [5], 0)]
)
def test_an_output_that_ends_elsewhere_is_a_bug(expected: list[int], got: list[int], position: int) -> None:
    found = examiner(torch.float32)[0].compare(TEXT, expected, got)
    assert found is not None
    assert (found.position, found.gap, found.verdict) == (position, None, "bug")
    assert (found.expected is None) == (len(expected) == position)
    assert (found.got is None) == (len(got) == position)


def test_a_model_that_judges_itself_is_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other rows change what a row gets (LLM.int8's outliers do), that much is no bug."""
    monkeypatch.setattr("eval.differences.LARGEST_REPLAY", 10)
    judge, model = examiner(torch.float32)
    order, logits = ranked(model)
    gap = float(logits[order[0]] - logits[order[1]])
    for share, verdict in ((0.4, "bug"), (0.6, "tie")):

        def disturb(module: Any, args: Any, output: torch.Tensor, share: float = share) -> torch.Tensor:
            output[..., order[5]] -= share * gap * (output.shape[1] % 2)
            return output

        hook = model.get_output_embeddings().register_forward_hook(disturb)
        found = judge.compare(TEXT, [order[0]], [order[1]])
        hook.remove()
        assert found is not None
        assert found.verdict == verdict


def test_a_model_too_large_to_copy_judges_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.differences.LARGEST_REPLAY", 10)
    judge, model = examiner(torch.float32)
    order, _ = ranked(model)
    found = judge.compare(TEXT, [order[0]], [order[3]])
    assert found is not None
    assert found.verdict == "bug"
    assert judge._judge is model


@pytest.mark.parametrize("choosing", [Choosing(), Choosing(sample=True, seed=3)])
def test_what_the_rule_sees_is_judged(choosing: Choosing, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of the generation config that lifts the second token right up to the first makes a tie of the two."""
    plain, model = examiner(torch.float64)
    judge = Examiner(plain.target, choosing)
    seen = judge._preferences([TEXT], len(TEXT), next_logits(model, TEXT)[None], 5)[0]  # by stream 5
    first, second = seen.topk(2).indices.tolist()
    gap = float(seen[first] - seen[second])
    for bias, verdict in ((gap, "tie"), (gap / 2, "bug"), (2 * gap, "bug")):
        config = GenerationConfig(sequence_bias=[[[second], bias]])
        monkeypatch.setattr(model, "generation_config", config)
        found = judge.compare(TEXT, [first], [second], 5)
        assert found is not None
        assert (found.verdict, found.gap) == (verdict, pytest.approx(abs(gap - bias), abs=1e-5))


@pytest.mark.parametrize(
    ("stored", "choosing"),
    [
        ({"repetition_penalty": 3.0}, Choosing()),
        ({}, Choosing(sample=True, temperature=1.5)),
        ({"no_repeat_ngram_size": 1, "top_k": 9}, Choosing(sample=True, seed=4)),
    ],
)
def test_the_models_own_choices_are_those_of_plain_decoding(
    stored: dict[str, Any], choosing: Choosing, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = examiner(torch.float64)
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**stored))
    target = plain.target
    drafter, rule = make_drafter("autoregressive", target.runner), make_rule(target, choosing)
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_ids": (), "rule": rule, "streams": [5]}
    tokens = decode(target.runner, drafter, [TEXT], **options)[0].tokens
    judge = Examiner(target, choosing)
    assert judge.own_choices(TEXT, tokens, 5) == tokens
    if choosing.sample:
        assert judge.own_choices(TEXT, tokens, 6) != tokens
    changed = [*tokens[:3], (tokens[3] + 1) % 64, *tokens[4:]]
    found = judge.compare(TEXT, tokens, changed, 5)
    assert found is not None
    assert (found.position, found.verdict) == (3, "bug")


def test_how_far_a_token_is_from_being_chosen() -> None:
    logits = torch.tensor([1.0, 4.0, -torch.inf, -5.0], dtype=torch.float64)
    assert likeliest_gap(logits, logits + 0.5, (0, 1)) == pytest.approx((3.0, 0.5, 5.0))
    assert likeliest_gap(logits, logits, (1, 2)) == (torch.inf, 0.0, 5.0)
