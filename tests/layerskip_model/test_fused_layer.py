"""Fused layers against the model's own, and what fusing leaves of the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma import GemmaConfig
from transformers.models.qwen2 import Qwen2Config

from layerskip_model.fused_layer import Linear, NotFusible, fast_norm
from layerskip_model.runner import Runner
from tests.tiny_models import tiny_model

TOKENS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(4))


def other_model(config: type, **changes: Any) -> PreTrainedModel:
    """A random model of a type that tiny_model does not have."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(config(**{**sizes, **changes}), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


def model_of(kind: str) -> PreTrainedModel:
    """Those beside tiny_model's have biases (qwen2), or norms that are not torch's (gemma)."""
    if kind == "qwen2":
        return other_model(Qwen2Config)
    if kind == "gemma":
        return other_model(GemmaConfig)
    return tiny_model(kind, dtype=torch.float32)


class Growing:
    """Appends what comes."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        old = self.layers.get(layer_idx)
        pairs = (
            (keys, values) if old is None else (torch.cat((old[0], keys), 2), torch.cat((old[1], values), 2))
        )
        self.layers[layer_idx] = pairs[0], pairs[1]
        return self.layers[layer_idx]


def logits(runner: Runner) -> Tensor:
    """By a prefill of 5 tokens, a chunk of 3 and a single token."""
    cache, tables, parts = Growing(), runner.tables(16, 16), []
    with torch.inference_mode():
        for begin, count in ((0, 5), (5, 3), (8, 1)):
            context = runner.span(cache, tables, begin, count)
            result = runner.forward(TOKENS[:, begin : begin + count], 0, runner.num_layers, context)
            assert result.logits is not None
            parts.append(result.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "qwen2", "gemma"])
def test_fused_layers_compute_what_the_model_computes(kind: str) -> None:
    model = model_of(kind)
    with torch.inference_mode():
        expected = model(input_ids=TOKENS).logits
    runner = Runner(model)
    assert runner.fused is not None
    torch.testing.assert_close(logits(runner), expected, rtol=1e-4, atol=1e-4)
    runner = copy.copy(runner)
    runner.fused = None  # the model's own layers, over the same weights
    torch.testing.assert_close(logits(runner), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "olmo2", "phi3"])
def test_layers_with_other_parts_are_called_as_they_are(kind: str) -> None:
    assert Runner(tiny_model(kind)).fused is None


def test_eager_attention_is_the_models_own() -> None:
    assert Runner(tiny_model(attention="eager")).fused is None


def test_a_layer_that_looks_alike_and_computes_something_else_is_not_fused() -> None:
    model = tiny_model()
    model.get_decoder().layers[2].self_attn.scaling *= 2.0  # known to the fused layer
    assert Runner(model).fused is not None
    layer: Any = model.get_decoder().layers[2]
    forward = layer.forward
    layer.forward = lambda hidden, **kwargs: 1.01 * forward(hidden, **kwargs)
    assert Runner(model).fused is None


def test_weights_are_held_once_and_the_model_still_saves_and_copies(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    runner = Runner(model)
    assert runner.fused is not None
    for layer, fused in zip(model.get_decoder().layers, runner.fused, strict=True):
        for part, matrix in ((layer.self_attn.k_proj, fused.qkv), (layer.mlp.up_proj, fused.gate_up)):
            assert part.weight.untyped_storage().data_ptr() == matrix.transposed.untyped_storage().data_ptr()
    model.save_pretrained(tmp_path)
    for other in (AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model), model):
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    twin = copy.deepcopy(model).double()
    twin.get_decoder().layers[0].self_attn.q_proj.weight.data.zero_()
    assert torch.equal(
        model.state_dict()["model.layers.0.self_attn.q_proj.weight"],
        before["model.layers.0.self_attn.q_proj.weight"],
    )


def test_linear_maps_with_and_without_bias() -> None:
    torch.manual_seed(0)
    inputs, hidden = torch.randn(3, 5), torch.randn(3, 11)
    for bias in (True, False):
        parts = [nn.Linear(5, 4, bias=bias), nn.Linear(5, 7, bias=bias)]
        expected = torch.cat([part(inputs) for part in parts], dim=1)
        fused = Linear(parts)
        torch.testing.assert_close(fused(inputs), expected)
        torch.testing.assert_close(fused.added_to(hidden, inputs), hidden + expected)
    with pytest.raises(NotFusible):
        Linear([nn.Linear(5, 4, bias=True), nn.Linear(5, 7, bias=False)])
    with pytest.raises(NotFusible):
        Linear([nn.Linear(5, 4, device="meta")])


def test_a_norm_that_is_not_torchs_is_called() -> None:
    norm = nn.RMSNorm(8, eps=1e-6)
    assert fast_norm(norm) is not norm

    class Plus(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.001

    other = Plus(8, eps=1e-6)
    assert fast_norm(other) is other
