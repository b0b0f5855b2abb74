"""Who sees whom, and that a node of a tree gets the logits of the text that it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from eval.decoding.acceptance import Greedy
from eval.decoding.drafters.base import State
from eval.decoding.tree import Draft, after_prefix, ancestor_mask, by_slot
from layerskip_model.runner import Runner
from tests.tiny_models import tiny_model


@st.composite
def parents_of_trees(draw: st.DrawFn) -> list[int]:
    n = draw(st.integers(1, 12))
    return [-1] + [draw(st.integers(-1, node - 1)) for node in range(1, n)]


def path_to(parents: list[int], node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


@settings(max_examples=50, deadline=None)
@given(parents_of_trees())
def test_ancestor_mask(parents: list[int]) -> None:
    mask = ancestor_mask(torch.tensor([parents, list(range(-1, len(parents) - 1))]))
    n = len(parents)
    assert mask[0].tolist() == [[j in path_to(parents, i) for j in range(n)] for i in range(n)]
    assert torch.equal(mask[1], torch.ones(n, n, dtype=torch.bool).tril())


def test_masks_over_slots_and_prefix() -> None:
    visible = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    slot = torch.tensor([[0, 3, 1, 5], [0, 1, 2, 3]])  # with gaps in the first row
    length = torch.tensor([[2], [3]])
    seen = after_prefix(by_slot(visible, slot, 6), length, 10)
    assert seen.shape == (2, 3, 10)
    for row in range(2):
        for node in range(3):
            begin = int(length[row])
            keys = {begin + int(slot[row, j]) for j in range(4) if visible[row, node, j]}
            assert seen[row, node].tolist() == [k < begin or k in keys for k in range(10)]


TOLERANCE = 1e-5  # norms and softmaxes of float64 models compute in float32
PARENTS = [-1, 0, 0, 1, 2, 2, 4]


def tree_draft(state: State, tokens: Tensor, order: list[int]) -> Draft:
    """A tree of 7 nodes, node i in slot `order[i]` after the committed length."""
    batch, n = tokens.shape
    length = torch.tensor(state.lengths)[:, None]
    depth = torch.tensor([len(path_to(PARENTS, node)) - 1 for node in range(n)])
    true = torch.ones(batch, n, dtype=torch.bool)
    parents = torch.tensor([PARENTS] * batch)
    return Draft(tokens, parents, length + depth, length + torch.tensor(order), true, true)


def logits_of_path(model: PreTrainedModel, prompt: list[int], tokens: Tensor, node: int) -> Tensor:
    """A separate causal pass over the prompt and the path to one node."""
    path = [int(tokens[index]) for index in path_to(PARENTS, node)]
    return model(input_ids=torch.tensor([prompt + path])).logits[0, -1]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gemma2"])
@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [8, 9, 10, 11, 12, 13]]], ids=["one", "two"])
def test_tree_logits_equal_a_pass_over_each_path(kind: str, prompts: list[list[int]]) -> None:
    # A window shorter than the tree is deep: what it hides goes by position, not by slot.
    changes: dict[str, Any] = {"sliding_window": 2} if kind in ("mistral", "gemma3") else {}
    model = tiny_model(kind, **changes)
    runner = Runner(model)
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        state = State(runner, prompts, 24, 7, Greedy())
        width = max(len(prompt) for prompt in prompts)
        padded = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        runner.run(runner.embed(padded), 0, 4, state.chain_context(0, width))
        state.cache.lengths = [len(prompt) for prompt in prompts]
        tokens = torch.randint(64, (len(prompts), 7), generator=generator)
        state.begin_step([0] * len(prompts), [9] * len(prompts), [False] * len(prompts))
        draft = tree_draft(state, tokens, [0, 4, 2, 1, 6, 3, 5])
        context = state.context(draft)
        actual = runner.logits(runner.run(runner.embed(tokens), 0, 4, context))
        # Level by level, as a drafter that grows its tree does.
        for first, stop in ((0, 1), (1, 3), (3, 6), (6, 7)):
            level = runner.run(runner.embed(tokens[:, first:stop]), 0, 4, state.context(draft, first, stop))
            torch.testing.assert_close(runner.logits(level), actual[:, first:stop], rtol=0, atol=TOLERANCE)
        for row, prompt in enumerate(prompts):
            for node in range(7):
                expected = logits_of_path(model, prompt, tokens[row], node)
                torch.testing.assert_close(actual[row, node], expected, rtol=0, atol=TOLERANCE)
        keep_and_compare(runner, state, draft, prompts)


def keep_and_compare(runner: Runner, state: State, draft: Draft, prompts: list[list[int]]) -> None:
    """After `keep` the cache holds what a fresh prefill of prompt and path puts there."""
    path = [0, 2, 4, 6]
    state.cache.keep([path] * len(prompts), draft.slot)
    for row, prompt in enumerate(prompts):
        text = prompt + draft.tokens[row, path].tolist()
        assert state.lengths[row] == len(text)
        fresh = State(runner, [text], 24, 1, Greedy())
        runner.run(runner.embed(torch.tensor([text])), 0, 4, fresh.chain_context(0, len(text)))
        for ours, theirs in zip(
            state.cache.keys + state.cache.values, fresh.cache.keys + fresh.cache.values, strict=True
        ):
            assert ours is not None
            assert theirs is not None
            torch.testing.assert_close(
                ours[row, :, : len(text)], theirs[0, :, : len(text)], rtol=0, atol=TOLERANCE
            )
