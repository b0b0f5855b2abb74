"""EAGLE in the loop: whatever its heads draft, the output is plain decoding's, and ends where that ends."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eval.decoding.capture import GraphRunner
from eval.decoding.growing import Shape
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.static_tree import checked_tree
from eval.decoding.typical import Typical
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.eval.decoding.eagle_heads import CASES, NEW, Fitted, drafting, eagle_draft, fitted_head, head_for
from tests.eval.decoding.sampled import LOWEST, PROMPT, draws, p_value, sampled_model, text_probabilities
from tests.eval.decoding.sampled import sampling as sampling_rule
from tests.eval.decoding.test_maskless import maskless
from tests.eval.decoding.test_self_tree import run
from tests.eval.decoding.test_speculate import PROMPTS, naive_greedy
from tests.layerskip_model.tiny_eagle import some_head
from tests.tiny_models import tiny_model

LLAMA = Fitted()
ALL = pytest.mark.parametrize("case", CASES)
SHAPES = [(1, 1, 1), (1, 4, 4), (5, 1, 5), (3, 2, 4), (4, 4, 30), (9, 3, 2)]  # depth, top k, tokens


@ALL
def test_rows_decode_alone_as_they_do_together(case: str) -> None:
    together = run(LLAMA.runner, LLAMA.drafter(case), PROMPTS)
    alone = [run(LLAMA.runner, LLAMA.drafter(case), [prompt])[0] for prompt in PROMPTS]
    assert [row.tokens for row in together] == [row.tokens for row in alone] == LLAMA.future
    for row, single in zip(together, alone, strict=True):
        assert (row.accepted_lengths, row.drafted) == (single.accepted_lengths, single.drafted)
        assert sum(row.accepted_lengths) == NEW - 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_of_tree(shape: tuple[int, int, int]) -> None:
    for strategy in ("eagle2", "eagle3"):
        drafter = drafting(strategy, LLAMA.runner, LLAMA.drafts[strategy], Shape(*shape))
        rows = run(LLAMA.runner, drafter, PROMPTS)
        assert [row.tokens for row in rows] == LLAMA.future
        assert 1 < max(max(row.accepted_lengths) for row in rows) <= 1 + min(shape[0], shape[2])


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_head_that_knows_nothing_does_no_harm(kind: str) -> None:
    head = some_head(kind, LLAMA.model, reduced=True).requires_grad_(False).eval()
    for case, (strategy, shape) in CASES.items():
        if (strategy == "eagle3") == (kind == "eagle3"):
            drafter = drafting(strategy, LLAMA.runner, eagle_draft(LLAMA.runner, head), shape)
            assert [row.tokens for row in run(LLAMA.runner, drafter, PROMPTS)] == LLAMA.future, case


@pytest.mark.parametrize("new", range(1, 8))
@ALL
def test_max_new_tokens_inside_a_draft(case: str, new: int) -> None:
    """No draft goes beyond the room."""
    rows = run(LLAMA.runner, LLAMA.drafter(case), PROMPTS, max_new_tokens=new)
    assert [row.tokens for row in rows] == [future[:new] for future in LLAMA.future]
    assert all(sum(row.accepted_lengths) == new - 1 for row in rows)


@ALL
def test_rows_end_at_different_times(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the model's context, by an end token, and at their limit: each where plain decoding ends."""
    monkeypatch.setattr(LLAMA.runner, "context_length", 15)
    for eos in ((), (LLAMA.future[1][3],)):
        options: dict[str, Any] = {"max_new_tokens": 11, "eos_token_ids": eos}
        expected = run(LLAMA.runner, None, PROMPTS, **options)
        assert len({len(row.tokens) for row in expected}) == 3
        for runner in (LLAMA.runner, GraphRunner(LLAMA.runner)):
            rows = run(runner, LLAMA.drafter(case, runner), PROMPTS, **options)
            assert [(row.tokens, row.finish_reason) for row in rows] == [
                (row.tokens, row.finish_reason) for row in expected
            ]


@ALL
def test_an_end_token_inside_an_accepted_path_ends_the_row(case: str) -> None:
    """The others go on, with what their own head knows."""
    plain = run(LLAMA.runner, LLAMA.drafter(case), PROMPTS)
    (row, place), *_ = [
        (row, place)
        for row, (one, future) in enumerate(zip(plain, LLAMA.future, strict=True))
        for place in _inside(one.accepted_lengths)
        if future[place] not in future[:place]
    ]
    eos = LLAMA.future[row][place]
    rows = run(LLAMA.runner, LLAMA.drafter(case), PROMPTS, eos_token_ids=(eos,))
    for one, tokens in zip(rows, LLAMA.future, strict=True):
        assert one.tokens == (tokens[: tokens.index(eos) + 1] if eos in tokens else tokens)
    assert 1 + sum(rows[row].accepted_lengths) > len(rows[row].tokens)


def _inside(lengths: list[int]) -> list[int]:
    """The places of accepted drafts that others, or the target's own token, follow in the same step."""
    starts = [1 + sum(lengths[:step]) for step in range(len(lengths))]
    return [
        place for start, won in zip(starts, lengths, strict=True) for place in range(start, start + won - 1)
    ]


@ALL
def test_passes_of_fixed_shape_give_the_same_tokens(case: str) -> None:
    """What CUDA graphs record, without the recording."""
    graphs = GraphRunner(LLAMA.runner)
    for prompts, new in ((PROMPTS[:1], NEW), (PROMPTS, 7)):
        plain, fixed = (
            run(one, LLAMA.drafter(case, one), prompts, max_new_tokens=new) for one in (LLAMA.runner, graphs)
        )
        assert [(row.tokens, row.accepted_lengths) for row in fixed] == [
            (row.tokens, row.accepted_lengths) for row in plain
        ]


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 3, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
@ALL
def test_what_is_drawn_is_what_plain_sampling_draws(case: str, settings: dict[str, Any]) -> None:
    """Token by token, on the same stream, together and alone."""
    rule, streams = Sampling(Shaping(settings, (), 64), 0), [4, 0, 9]
    expected = run(LLAMA.runner, None, PROMPTS, rule=rule, streams=streams)
    rows = run(LLAMA.runner, LLAMA.drafter(case), PROMPTS, rule=rule, streams=streams)
    assert [row.tokens for row in rows] == [row.tokens for row in expected]
    alone = [
        run(LLAMA.runner, LLAMA.drafter(case), [prompt], rule=rule, streams=[stream])[0]
        for prompt, stream in zip(PROMPTS, streams, strict=True)
    ]
    assert [row.accepted_lengths for row in rows] == [row.accepted_lengths for row in alone]


@cache
def six_tokens() -> tuple[Runner, dict[str, Any]]:
    """A model of six tokens, and heads that know some of what it says."""
    model = sampled_model(layers=4)
    runner = Runner(model)
    text = PROMPT + naive_greedy(model, PROMPT, 8)
    return runner, {kind: fitted_head(kind, model, [text]) for kind in ("eagle", "eagle3")}


@pytest.mark.parametrize("strategy", ["eagle", "eagle2", "eagle3"])
def test_texts_follow_the_models_own_distribution(strategy: str) -> None:
    """Children to which top-k, or a reduced vocabulary, leaves no probability are among the drafts."""
    settings = {"temperature": 1.2, "top_k": 3}
    runner, heads = six_tokens()
    draft = eagle_draft(runner, heads["eagle3" if strategy == "eagle3" else "eagle"])
    small = checked_tree("small", [[0], [1], [0, 0], [0, 1], [1, 0]])
    drafter = drafting(strategy, runner, draft, small if strategy == "eagle" else Shape(2, 3, 5))
    tokens = draws(runner, strategy, sampling_rule(settings), 5000, **vars(drafter.settings))
    assert p_value(tokens, text_probabilities(runner.model, settings)) > LOWEST
    plain = draws(runner, "autoregressive", sampling_rule(settings), 5000)
    assert (tokens != plain).any(dim=1).sum() <= 2  # but for rounding where a number is at an edge


@ALL
def test_typical_acceptance_keeps_what_is_likely(case: str) -> None:
    """With no limits the deepest path of every draft."""
    rule = Typical(Shaping({"temperature": 1.0}, (), 64), 0, 0.0, 0.3)
    rows = run(LLAMA.runner, LLAMA.drafter(case), PROMPTS, max_new_tokens=9, rule=rule)
    deepest = 4 if case.endswith("chain") and not case.startswith("eagle,") else 3
    for row in rows:
        assert max(row.accepted_lengths) == row.accepted_lengths[0] <= deepest + 1
    if case.endswith("chain") or case == "eagle, tree":
        assert rows[0].accepted_lengths[0] == deepest + 1


def test_attention_without_masks_takes_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", maskless)
    model = tiny_model(attention="eager", tie_word_embeddings=False)
    model.config._attn_implementation = "flash_attention_2"
    runner = Runner(model)
    for case, (strategy, shape) in CASES.items():
        drafter = drafting(
            strategy, runner, eagle_draft(runner, head_for(model, LLAMA.head(strategy))), shape
        )
        if case.endswith("chain"):
            (row,) = run(runner, drafter, PROMPTS[:1])
            (same,) = run(LLAMA.runner, LLAMA.drafter(case), PROMPTS[:1])
            assert (row.tokens, row.accepted_lengths) == (same.tokens, same.accepted_lengths)
        else:
            with pytest.raises(UserError, match="takes no mask"):
                run(runner, drafter, PROMPTS[:1])


def test_half_precision() -> None:
    """In bfloat16, where ties do happen, all goes through."""
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=False)
    runner = Runner(model)
    plain = run(runner, None, PROMPTS)
    for case, (strategy, shape) in CASES.items():
        draft = eagle_draft(runner, head_for(model, LLAMA.head(strategy)))
        rows = run(runner, drafting(strategy, runner, draft, shape), PROMPTS)
        assert [row.tokens[0] for row in rows] == [row.tokens[0] for row in plain], case
        assert [len(row.tokens) for row in rows] == [NEW] * 3
