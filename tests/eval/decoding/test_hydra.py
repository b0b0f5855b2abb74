"""Hydra heads draft the right trees, each level from the one above it, and nothing changes in the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eval.decoding.acceptance import Greedy, Rule
from eval.decoding.capture import GraphRunner
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.static_tree import TreeShape, checked_tree
from eval.decoding.tree import Draft
from eval.decoding.typical import Typical
from layerskip_model.hydra import HydraHeads
from layerskip_model.runner import Runner
from tests.eval.decoding.hydra_heads import fitted_heads, hydra, naive_lengths, naive_paths, naive_state
from tests.eval.decoding.medusa_heads import CHAIN, WIDE, medusa, random_heads
from tests.eval.decoding.sampled import LOWEST, PROMPT, draws, p_value, sampled_model, text_probabilities
from tests.eval.decoding.sampled import sampling as sampling_rule
from tests.eval.decoding.test_maskless import maskless
from tests.eval.decoding.test_self_tree import drafts_of, run
from tests.eval.decoding.test_speculate import PROMPTS, naive_greedy
from tests.layerskip_model.test_hydra import naive_logits, new_heads
from tests.tiny_models import tiny_model

NEW = 20


class Fitted:
    """A model, what it writes after the prompts, and heads that have learnt some of it."""

    def __init__(self, kind: str = "llama", *, prefix: bool = True) -> None:
        self.runner = Runner(tiny_model(kind, tie_word_embeddings=False))
        self.model = self.runner.model
        self.future = [naive_greedy(self.model, prompt, NEW) for prompt in PROMPTS]
        texts = [prompt + future for prompt, future in zip(PROMPTS, self.future, strict=True)]
        self.heads = fitted_heads(self.model, texts[:2], prefix=prefix)

    def lengths(self, shape: TreeShape, new: int = NEW) -> list[list[int]]:
        """What each step wins, by the naive twin."""
        return [
            naive_lengths(self.model, self.heads, shape, prompt, future[:new])
            for prompt, future in zip(PROMPTS, self.future, strict=True)
        ]


PLAIN, PREFIX = Fitted(prefix=False), Fitted()
BOTH = pytest.mark.parametrize("fitted", [PLAIN, PREFIX], ids=["hydra", "hydra++"])
SHAPES = pytest.mark.parametrize("shape", [CHAIN, WIDE], ids=["chain", "tree"])


def check_greedy(fitted: Fitted, shape: TreeShape) -> None:
    """The model's own text, in as few steps as the naive twin, rows together and alone."""
    together = run(fitted.runner, hydra(fitted.runner, fitted.heads, shape), PROMPTS)
    alone = [run(fitted.runner, hydra(fitted.runner, fitted.heads, shape), [one])[0] for one in PROMPTS]
    assert [row.tokens for row in together] == [row.tokens for row in alone] == fitted.future
    lengths = fitted.lengths(shape)
    assert [row.accepted_lengths for row in together] == [row.accepted_lengths for row in alone] == lengths
    assert {1, 4} < {length for row in lengths for length in row}  # rejected at once, never, and in between


@BOTH
@SHAPES
def test_greedy_decoding_is_lossless_and_wins_what_the_heads_know(fitted: Fitted, shape: TreeShape) -> None:
    check_greedy(fitted, shape)


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "gemma2", "gemma3", "phi3"])
def test_other_kinds_of_attention(kind: str) -> None:
    """In the draft layer, too: sliding windows shorter than the texts, layers that cannot be fused."""
    check_greedy(Fitted(kind), WIDE)


@pytest.mark.parametrize("settings", [{}, {"prefix_attention": True}, {"shared": True, "layers": 1}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_drafted_tree_is_that_of_separate_paths(kind: str, settings: dict[str, Any]) -> None:
    """Each node is the so-manieth best after the path to it, whatever else is drafted beside it."""
    runner = Runner(tiny_model(kind))
    heads = new_heads(runner.model, **settings)
    drafts = drafts_of(runner, hydra(runner, heads, WIDE), PROMPTS, 12)
    for texts, draft in drafts[:3]:  # with room for all of it
        for row, text in enumerate(texts):
            expected = naive_paths(runner.model, heads, text, WIDE)
            assert sorted(paths_in(draft, row)) == sorted(expected.values())


def paths_in(draft: Draft, row: int) -> list[list[int]]:
    """The tokens on the way to each node, the root's left out."""
    paths: list[list[int]] = [[]]
    for node in range(1, draft.num_nodes):
        paths.append([*paths[int(draft.parents[row, node])], int(draft.tokens[row, node])])
    return paths[1:]


@pytest.mark.parametrize("settings", [None, {"temperature": 0.8, "top_k": 9}], ids=["greedy", "sampling"])
@SHAPES
def test_heads_that_ignore_the_path_draft_as_medusas_do(
    shape: TreeShape, settings: dict[str, Any] | None
) -> None:
    runner = PLAIN.runner
    theirs = random_heads(runner.model)
    heads = HydraHeads.new(runner.backbone, heads=3, layers=1, prefix_attention=False).double()
    for index in range(3):
        block = theirs.get_submodule(f"blocks.{index}.0.linear")
        first = heads.first(index)
        first.linear.weight.data[:, :32] = block.get_parameter("weight")
        first.linear.bias.data[:] = block.get_parameter("bias")
        weight = heads.projection(index).get_parameter("weight")
        weight.data[:] = theirs.get_parameter(f"projections.{index}.weight")
    options: dict[str, Any] = {}
    if settings is not None:
        options["rule"] = Sampling(Shaping(settings, (), 64), 0)
    ours, others = (
        drafts_of(runner, drafter, PROMPTS, **options)
        for drafter in (hydra(runner, heads, shape), medusa(runner, theirs, shape))
    )
    assert len(ours) == len(others)
    for (_, draft), (_, other) in zip(ours, others, strict=True):
        assert torch.equal(draft.tokens, other.tokens)


@BOTH
@pytest.mark.parametrize("new", range(1, 8))
def test_a_tree_deeper_than_the_room_is_cut(fitted: Fitted, new: int) -> None:
    rows = run(fitted.runner, hydra(fitted.runner, fitted.heads, WIDE), PROMPTS, max_new_tokens=new)
    assert [row.tokens for row in rows] == [future[:new] for future in fitted.future]
    assert [row.accepted_lengths for row in rows] == fitted.lengths(WIDE, new)


@BOTH
def test_rows_end_at_different_times(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the model's context, by an end token, and at their limit: each where plain decoding ends."""
    monkeypatch.setattr(fitted.runner, "context_length", 15)
    for eos in ((), (fitted.future[1][3],)):
        options: dict[str, Any] = {"max_new_tokens": 11, "eos_token_ids": eos}
        expected = run(fitted.runner, None, PROMPTS, **options)
        assert len({len(row.tokens) for row in expected}) == 3
        for runner in (fitted.runner, GraphRunner(fitted.runner)):
            rows = run(runner, hydra(runner, fitted.heads, WIDE), PROMPTS, **options)
            assert [(row.tokens, row.finish_reason) for row in rows] == [
                (row.tokens, row.finish_reason) for row in expected
            ]


@SHAPES
def test_an_end_token_inside_an_accepted_path_ends_the_row(shape: TreeShape) -> None:
    """The others go on, with what their own draft layer knows."""
    lengths, future = PREFIX.lengths(shape)[0], PREFIX.future[0]
    starts = [1 + sum(lengths[:step]) for step in range(len(lengths))]
    inside = [
        place
        for start, length in zip(starts, lengths, strict=True)
        for place in range(start, start + length - 1)
        if future[place] not in future[:place]
    ]
    eos = future[inside[0]]
    rows = run(PREFIX.runner, hydra(PREFIX.runner, PREFIX.heads, shape), PROMPTS, eos_token_ids=(eos,))
    for row, tokens in zip(rows, PREFIX.future, strict=True):
        assert row.tokens == (tokens[: tokens.index(eos) + 1] if eos in tokens else tokens)
    assert 1 + sum(rows[0].accepted_lengths) > len(rows[0].tokens)


@SHAPES
def test_passes_of_fixed_shape_give_the_same_tokens(shape: TreeShape) -> None:
    """What CUDA graphs record, without the recording."""
    graphs = GraphRunner(PREFIX.runner)
    for prompts, new in ((PROMPTS[:1], NEW), (PROMPTS, 7)):
        plain, fixed = (
            run(one, hydra(one, PREFIX.heads, shape), prompts, max_new_tokens=new)
            for one in (PREFIX.runner, graphs)
        )
        assert [(row.tokens, row.accepted_lengths) for row in fixed] == [
            (row.tokens, row.accepted_lengths) for row in plain
        ]


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 3, "repetition_penalty": 1.5},
]


@BOTH
@pytest.mark.parametrize("settings", SAMPLING, ids=str)
def test_what_is_drawn_is_what_plain_sampling_draws(fitted: Fitted, settings: dict[str, Any]) -> None:
    """Token by token, on the same stream, together and alone."""
    rule, streams = Sampling(Shaping(settings, (), 64), 0), [4, 0, 9]
    expected = run(fitted.runner, None, PROMPTS, rule=rule, streams=streams)
    rows = run(fitted.runner, hydra(fitted.runner, fitted.heads, WIDE), PROMPTS, rule=rule, streams=streams)
    assert [row.tokens for row in rows] == [row.tokens for row in expected]
    alone = [
        run(fitted.runner, hydra(fitted.runner, fitted.heads, WIDE), [prompt], rule=rule, streams=[stream])[0]
        for prompt, stream in zip(PROMPTS, streams, strict=True)
    ]
    assert [row.accepted_lengths for row in rows] == [row.accepted_lengths for row in alone]


def test_texts_follow_the_models_own_distribution() -> None:
    settings = {"temperature": 1.2, "top_k": 3}
    model = sampled_model()
    runner = Runner(model)
    heads = fitted_heads(model, [PROMPT + naive_greedy(model, PROMPT, 8)], prefix=True, number=2)
    drafter = hydra(runner, heads, checked_tree("small", [[0], [1], [0, 0], [0, 1], [1, 0]]))
    tokens = draws(runner, "hydra", sampling_rule(settings), 5000, **vars(drafter.settings))
    assert p_value(tokens, text_probabilities(model, settings)) > LOWEST


@pytest.mark.parametrize("is_sampling", [False, True])
def test_each_node_is_chosen_after_its_own_path(is_sampling: bool) -> None:
    """Where the rule forbids it, no token is drafted twice on a path, whatever the heads say."""
    rule = without_repetition(Sampling if is_sampling else Greedy)
    expected = run(PREFIX.runner, None, PROMPTS, rule=rule)
    rows = run(PREFIX.runner, hydra(PREFIX.runner, PREFIX.heads, WIDE), PROMPTS, rule=rule)
    assert [row.tokens for row in rows] == [row.tokens for row in expected]
    assert is_sampling or drafts_what_separate_paths_do(no_repeats=True)


def without_repetition(kind: type[Greedy] | type[Sampling] = Greedy) -> Rule:
    shaping = Shaping({"no_repeat_ngram_size": 1}, (), 64)
    return Greedy(shaping) if kind is Greedy else Sampling(shaping, 0)


def drafts_what_separate_paths_do(*, no_repeats: bool = False) -> bool:
    """At every step in which the whole tree has room."""
    drafter = hydra(PREFIX.runner, PREFIX.heads, WIDE)
    rule = without_repetition() if no_repeats else Greedy()
    return all(
        sorted(paths_in(draft, row))
        == sorted(naive_paths(PREFIX.model, PREFIX.heads, text, WIDE, no_repeats=no_repeats).values())
        for texts, draft in drafts_of(PREFIX.runner, drafter, PROMPTS, rule=rule)
        if draft.num_nodes > WIDE.size
        for row, text in enumerate(texts)
        if len(text) < len(PROMPTS[row]) + 16  # a row that has ended has no part in it
    )


def test_typical_acceptance_keeps_what_is_likely() -> None:
    """With no limits the deepest path of every tree."""
    rule = Typical(Shaping({"temperature": 1.0}, (), 64), 0, 0.0, 0.3)
    drafter = hydra(PREFIX.runner, PREFIX.heads, WIDE)
    rows = run(PREFIX.runner, drafter, PROMPTS, max_new_tokens=17, rule=rule)
    assert [row.accepted_lengths for row in rows] == [[4] * 4] * 3


@BOTH
@pytest.mark.parametrize("first", [0, 5, 40])
def test_along_a_text_each_guess_follows_its_own_tokens(fitted: Fitted, first: int) -> None:
    """What decides a tree: the logits that decoding would have after the right path."""
    text = PROMPTS[0] + fitted.future[0]
    runner, model, heads = fitted.runner, fitted.model, fitted.heads
    with torch.inference_mode():
        hidden = runner.backbone.final_states(torch.tensor([text]))[0]
        embedded = runner.embed(torch.tensor(text))
        found = list(hydra(runner, heads).along(hidden, torch.tensor(text), first))  # type: ignore[attr-defined]
        assert [len(logits) for logits in found] == [max(0, len(text) - 2 - i - first) for i in range(3)]
        for index, logits in enumerate(found):
            for place, ours in enumerate(logits, first):
                state = naive_state(model, heads, text[: place + 2])
                path = list(embedded[place + 1 : place + 2 + index])
                torch.testing.assert_close(ours, naive_logits(heads, index, state, path, model))


def test_attention_without_masks_takes_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", maskless)
    model = tiny_model(attention="eager", tie_word_embeddings=False)
    model.config._attn_implementation = "flash_attention_2"
    runner = Runner(model)
    (row,) = run(runner, hydra(runner, PLAIN.heads, CHAIN), PROMPTS[:1])
    assert (row.tokens, row.accepted_lengths) == (PLAIN.future[0], PLAIN.lengths(CHAIN)[0])
