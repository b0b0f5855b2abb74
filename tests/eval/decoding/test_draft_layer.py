"""A draft layer over a cache computes what its own forward does over whole texts, whatever is run beside them."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor

from eval.decoding.acceptance import Greedy
from eval.decoding.draft_layer import LayerState, draft_layer_runner
from eval.decoding.drafters.base import State
from layerskip_model.draft_layer import DraftLayer
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.eval.decoding.trees import TOLERANCE, draft_of, path_to, random_tree
from tests.tiny_models import tiny_model

PROMPTS = [[3] * 7, [4] * 3, [5] * 6]  # what the tokens are does not matter: states are given
ROUNDS = [[1, 4, 2], [3, 1, 0], [2, 2, 0], [1, 3, 0]]  # how many each step commits; the last row ends
LENGTH = 16
FUSED = {"llama", "mistral", "qwen3"}


def draft_layer(runner: Runner) -> DraftLayer:
    """One in float64 with weights far from nothing."""
    layer = DraftLayer(runner.backbone).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    return layer


def some_states(batch: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, 32, generator=generator, dtype=torch.float64)


def begun(runner: Runner, layer: DraftLayer, nodes: int) -> LayerState:
    target = State(runner, PROMPTS, LENGTH, nodes, Greedy())
    return LayerState(draft_layer_runner(runner, layer), target, nodes)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "olmo2", "phi3"])
def test_texts_that_grow_unevenly_are_as_if_run_at_once(kind: str) -> None:
    """Padding is not seen; after every step what was committed is all there is. The windows are shorter than texts."""
    runner = Runner(tiny_model(kind))
    layer = draft_layer(runner)
    inputs = some_states(3, LENGTH, 0)
    expected = layer(inputs)
    state = begun(runner, layer, 5)
    assert (state.runner.fused is not None) == (kind in FUSED)
    for step, counts in enumerate([[len(prompt) for prompt in PROMPTS], *ROUNDS]):
        lengths = list(state.lengths)
        given = some_states(3, max(counts), 9 + step)  # where nothing of use is given
        for row, (begin, count) in enumerate(zip(lengths, counts, strict=True)):
            given[row, :count] = inputs[row, begin : begin + count]
        outputs = state.extend(given, counts)
        for row, (begin, count) in enumerate(zip(lengths, counts, strict=True)):
            wanted = expected[row, begin : begin + count]
            torch.testing.assert_close(outputs[row, :count], wanted, rtol=0, atol=TOLERANCE)
        assert state.lengths == [length + count for length, count in zip(lengths, counts, strict=True)]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_nodes_of_trees_are_as_if_their_paths_were_run_alone(kind: str) -> None:
    """And leave nothing behind: what is committed after them is as it was."""
    runner = Runner(tiny_model(kind))
    layer = draft_layer(runner)
    inputs = some_states(3, LENGTH, 0)
    state = begun(runner, layer, 8)
    lengths = [len(prompt) for prompt in PROMPTS]
    state.extend(inputs[:, :7], lengths)
    trees = [random_tree(Random(seed), 6, 8, plain=True) for seed in range(3)]
    tokens = torch.zeros((3, 6), dtype=torch.long)
    draft = draft_of(trees, tokens, torch.tensor(lengths)[:, None], 8)
    nodes = some_states(3, 6, 5)
    outputs = state.runner.run(nodes, 0, 1, state.context(draft))
    for row, tree in enumerate(trees):
        for node in range(6):
            path = path_to(tree.parents, node)
            alone = torch.cat([inputs[row, : lengths[row]], nodes[row, path]])
            expected = layer(alone[None])[0, -1]
            torch.testing.assert_close(outputs[row, node], expected, rtol=0, atol=TOLERANCE)
    after = torch.stack([inputs[row, length : length + 2] for row, length in enumerate(lengths)])
    outputs = state.extend(after, [2, 2, 2])
    for row, length in enumerate(lengths):
        expected = layer(inputs[row : row + 1, : length + 2])[0, -2:]
        torch.testing.assert_close(outputs[row], expected, rtol=0, atol=TOLERANCE)


def test_states_of_another_dtype_are_taken() -> None:
    """Heads in float32 that are still learning, on a model in half precision."""
    runner = Runner(tiny_model(dtype=torch.bfloat16), fuse=False)
    layer = DraftLayer(runner.backbone)
    made = draft_layer_runner(runner, layer)
    assert (made.dtype, made.fused) == (torch.float32, None)
    with torch.inference_mode():
        state = LayerState(made, State(runner, PROMPTS, LENGTH, 1, Greedy()), 1)
        inputs = some_states(3, 7, 0).to(torch.bfloat16)
        torch.testing.assert_close(state.extend(inputs, [7, 7, 7]), layer(inputs))


def test_a_layer_that_would_decode_differently_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(tiny_model())
    forward = DraftLayer.forward
    monkeypatch.setattr(DraftLayer, "forward", lambda self, hidden: 1.1 * forward(self, hidden))
    with pytest.raises(UserError, match=r"^a draft layer for model type 'llama' cannot be decoded with here"):
        draft_layer_runner(runner, draft_layer(runner))
