"""Hydra heads against naive twins: what a head reads, what it begins as, losses, gradients, measurements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.hydra import HydraHeads
from tests.tiny_models import tiny_model

HEADS = 3
TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(5))


def new_heads(model: PreTrainedModel, *, moved: bool = True, **changes: Any) -> HydraHeads:
    """Three heads in float64; `moved`: no longer as they begin, each in its own way."""
    settings = {"heads": HEADS, "layers": 2, "prefix_attention": False} | changes
    torch.manual_seed(0)
    heads = HydraHeads.new(Backbone(model), **settings).double()
    if moved:
        generator = torch.Generator().manual_seed(3)
        for parameter in heads.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return heads


def naive_logits(
    heads: HydraHeads, index: int, state: Tensor, path: list[Tensor], model: PreTrainedModel
) -> Tensor:
    """Head `index` at one place, written out: its state [hidden] and as many embeddings [hidden] as it reads."""
    weights = dict(heads.named_parameters())
    x = torch.cat([state, *path])
    for block in range(heads.layers):
        name = f"blocks.{index}.{block}"
        moved = weights[f"{name}.linear.weight"] @ x + weights[f"{name}.linear.bias"]
        if block == 0:
            kept = weights[f"{name}.res_connection.weight"] @ x + weights[f"{name}.res_connection.bias"]
        x = (kept if block == 0 else x) + functional.silu(moved)
    own = f"projections.{0 if heads.shared else index}"
    logits = weights[f"{own}.weight"] @ x + weights[f"{own}.bias"]
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_head_reads_the_state_and_the_tokens_before_its_own(kind: str, shared: bool) -> None:
    model = tiny_model(kind)
    backbone = Backbone(model)
    heads = new_heads(model, shared=shared)
    hidden, embedded = backbone.final_states(TOKENS), backbone.embed(TOKENS)
    for index in range(HEADS):
        path = embedded[:, 1 : index + 2]  # of the tokens after the first
        actual = heads.logits(index, hidden[:, 0], path)
        for row in range(2):
            expected = naive_logits(heads, index, hidden[row, 0], list(path[row]), model)
            torch.testing.assert_close(actual[row], expected)
    assert (heads.number, heads.layers, heads.shared, heads.prefix) == (HEADS, 2, shared, None)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("prefix", [False, True])
def test_every_head_begins_as_the_lm_head(kind: str, prefix: bool) -> None:
    """Exactly without the prefix layer, whose small first weights change the states a little."""
    model = tiny_model(kind, tie_word_embeddings=True)
    backbone = Backbone(model)
    for weight in backbone.norm.parameters():
        weight.data += 2.0  # a size that the norm of the prefix has to give back
    heads = new_heads(model, prefix_attention=prefix, moved=False)
    hidden = backbone.final_states(TOKENS)
    expected = backbone.head_map().logits(hidden)
    read = heads.prefix(hidden) if heads.prefix is not None else hidden
    path = torch.randn(2, 12, HEADS, 32, dtype=torch.float64)
    for index in range(HEADS):
        actual = heads.logits(index, read, path[..., : index + 1, :])
        if prefix:
            assert (actual.argmax(-1) == expected.argmax(-1)).float().mean() > 0.7
            torch.testing.assert_close(actual.std(), expected.std(), rtol=0.1, atol=0.0)
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    ours = {parameter.data_ptr() for parameter in heads.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in model.parameters()}


def test_a_bias_of_the_lm_head_is_copied() -> None:
    model = tiny_model()
    model.lm_head.bias = torch.nn.Parameter(torch.arange(64, dtype=torch.float64))
    heads = new_heads(model, moved=False)
    logits = heads.logits(0, torch.zeros(32), torch.zeros(1, 32))
    assert logits.tolist() == list(range(64))


def test_no_block_is_repeated_and_all_are_float32() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    heads = HydraHeads.new(Backbone(model), heads=2, layers=3, prefix_attention=True)
    sizes = {name: list(parameter.shape) for name, parameter in heads.named_parameters()}
    for index in range(2):
        for part in ("linear", "res_connection"):
            assert sizes[f"blocks.{index}.0.{part}.weight"] == [32, (index + 2) * 32]
        assert [sizes[f"blocks.{index}.{block}.linear.weight"] for block in (1, 2)] == [[32, 32]] * 2
    assert len({parameter.data_ptr() for parameter in heads.parameters()}) == len(sizes)
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.float32}


def test_dropout_is_for_training_only() -> None:
    model = tiny_model()
    heads = new_heads(model, dropout=0.5)
    hidden, path = torch.randn(1, 5, 32), torch.randn(1, 5, 1, 32)
    heads.train()
    assert not torch.equal(heads.state(0, hidden, path), heads.state(0, hidden, path))
    assert (heads.state(0, hidden, path) == 0).float().mean() > 0.3  # of what enters the projection too
    heads.eval()
    assert torch.equal(heads.state(0, hidden, path), heads.state(0, hidden, path))
