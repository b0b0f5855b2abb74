"""The runner computes what the model computes, in any chunks, for every model type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.granite import GraniteConfig

from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.tiny_models import CONFIGS, tiny_model

TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(5))

TOLERANCE = 1e-5  # norms and softmaxes of float64 models compute in float32


class Growing:
    """The naive cache."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        if layer_idx in self.layers:
            keys = torch.cat((self.layers[layer_idx][0], keys), dim=2)
            values = torch.cat((self.layers[layer_idx][1], values), dim=2)
        self.layers[layer_idx] = keys, values
        return keys, values


def logits_in_chunks(runner: Runner, tokens: Tensor, chunks: list[int], middle: int) -> Tensor:
    cache, tables, begin, parts = Growing(), runner.tables(32, 32), 0, []
    for count in chunks:
        context = runner.span(cache, tables, begin, count)
        hidden = runner.run(runner.embed(tokens[:, begin : begin + count]), 0, middle, context)
        parts.append(runner.logits(runner.run(hidden, middle, runner.num_layers, context)))
        begin += count
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_equal_the_models_own(kind: str, attention: str) -> None:
    if kind == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no sdpa for attention soft caps")
    model = tiny_model(kind, attention=attention)
    runner = Runner(model)
    with torch.inference_mode():
        expected = model(input_ids=TOKENS).logits
        for middle, chunks in ((0, [12]), (1, [6, 1, 1, 4]), (2, [1, 1, 7, 3]), (4, [2, 10])):
            actual = logits_in_chunks(runner, TOKENS, chunks, middle)
            torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_rows_at_any_positions_equal_a_chain() -> None:
    """The general context, with a mask of the caller's, gives what the context of chains gives."""
    runner = Runner(tiny_model("gemma3"))
    tables = runner.tables(32, 32)
    position = torch.arange(12)[None].expand(2, -1)
    seen = position[:, None] <= position[..., None]
    context = runner.scattered(Growing(), tables, position, seen, position)
    with torch.inference_mode():
        actual = runner.logits(runner.run(runner.embed(TOKENS), 0, 4, context))
        torch.testing.assert_close(actual, logits_in_chunks(runner, TOKENS, [12], 2), rtol=0, atol=TOLERANCE)


def test_run_reading_gives_the_states_that_leave_layers() -> None:
    model = tiny_model()
    runner = Runner(model)
    context = runner.span(Growing(), runner.tables(32, 32), 0, 12)
    with torch.inference_mode():
        hidden, states = runner.run_reading(runner.embed(TOKENS), 0, 4, context, (2, 0, 3))
        expected = model(input_ids=TOKENS, output_hidden_states=True).hidden_states  # entry 0: embeddings
    assert sorted(states) == [0, 2, 3]
    torch.testing.assert_close(states[0], expected[1])
    torch.testing.assert_close(states[2], expected[3])
    torch.testing.assert_close(runner.backbone.norm(states[3]), expected[4])
    assert hidden is states[3]


def test_masks_only_where_needed() -> None:
    """One row, and a prefill under sdpa, go without a mask until the window is shorter than the text."""
    runner = Runner(tiny_model("mistral"))
    tables = runner.tables(16, 16)
    for begin, count, needed in ((0, 5, False), (0, 6, True), (4, 1, False), (5, 1, True), (2, 2, True)):
        context = runner.span(Growing(), tables, begin, count)
        assert (context.masks["sliding_attention"] is not None) == needed, (begin, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_reason_to_refuse(dtype: torch.dtype) -> None:
    Runner(tiny_model("qwen3", dtype=dtype))


def test_nothing_is_left_on_the_model() -> None:
    model = tiny_model()
    before = [(set(vars(module)), len(module._forward_hooks)) for module in model.modules()]
    Runner(model)
    assert before == [(set(vars(module)), len(module._forward_hooks)) for module in model.modules()]


def test_horizon_fixes_scalings_that_depend_on_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    runner = Runner(tiny_model(max_position_embeddings=16, rope_parameters=rope))
    short, long = runner.tables(12, 40), runner.tables(40, 44)
    cos = short.rotary["full_attention"][0]
    assert cos.shape[1] == 40
    assert torch.equal(cos[:, 12:], cos[:, 11:12].expand_as(cos[:, 12:]))
    assert not torch.allclose(cos[:, :12], long.rotary["full_attention"][0][:, :12])


def test_a_model_that_differs_is_refused_with_the_difference() -> None:
    config = GraniteConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        embedding_multiplier=3.0,  # applied in the model's forward, outside the embedding module
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match=r"model type 'granite'.*off by [0-9.e-]+ \(allowed"):
        Runner(model)


def test_nan_weights_are_refused() -> None:
    model = tiny_model()
    model.get_decoder().norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="off by nan"):
        Runner(model)


def test_unknown_attention_is_refused() -> None:
    model = tiny_model()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match=r"flex_attention.*sdpa, eager"):
        Runner(model)
    model = tiny_model("qwen3")
    model.config.layer_types[1] = "linear_attention"
    with pytest.raises(UserError, match="layers of type 'linear_attention'"):
        Runner(model)


def test_training_mode_is_a_programming_mistake() -> None:
    with pytest.raises(ValueError, match="eval"):
        Runner(tiny_model().train())
