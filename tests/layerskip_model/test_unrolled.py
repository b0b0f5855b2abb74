"""Unrolled steps against drafting itself: each place and step by a dense run over what drafting from there sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from layerskip_model import head_map
from layerskip_model import unrolled as unrolled_module
from layerskip_model.backbone import Backbone
from layerskip_model.eagle import unrolled
from layerskip_model.layer_runner import LayerRunner
from layerskip_model.merged_attention import MergedAttention
from layerskip_model.runner import attention_kinds
from tests.layerskip_model.small import TOLERANCE
from tests.layerskip_model.tiny_eagle import Head, packed_batch, some_head
from tests.tiny_models import CONFIGS, tiny_model

HEADS = ["eagle", "eagle3"]
STEPS = 4


def naive(head: Head, embedded: Tensor, features: Tensor, positions: Tensor) -> list[list[list[Tensor]]]:
    """[step][row][t]: the committed places of t's document with their features, then what was drafted from t."""
    rows, length = positions.shape
    made: list[list[list[Tensor]]] = [[[] for _ in range(rows)] for _ in range(STEPS)]
    for row in range(rows):
        for t in range(length):
            begin = t - int(positions[row, t])
            inputs = [head.inputs(embedded[row, i], features[row, i]) for i in range(begin, t + 1)]
            for step in range(STEPS):
                if step:
                    place = t + step
                    token = embedded[row, place] if place < length else torch.zeros_like(embedded[row, 0])
                    inputs.append(head.inputs(token, made[step - 1][row][t]))
                text = torch.stack(inputs)[None]
                made[step][row].append(head.layer(text, torch.arange(text.shape[1])[None])[0, -1])
    return made


def some_inputs(
    kind: str, head: str, model: PreTrainedModel | None = None
) -> tuple[Head, Tensor, Tensor, Tensor]:
    """A head, embeddings, features that want a gradient, and positions."""
    model = tiny_model(kind) if model is None else model
    tokens, _, positions = packed_batch()
    embedded = Backbone(model).embed(tokens[:, 1:]).detach()
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 8, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    return some_head(head, model), embedded, features, positions[:, :-1]


def gradients(head: Head, features: Tensor, outputs: Tensor) -> dict[str, Tensor]:
    """Of a sum with random weights, so that no part cancels."""
    generator = torch.Generator().manual_seed(2)
    head.zero_grad()
    features.grad = None
    (outputs * torch.randn(outputs.shape, generator=generator, dtype=torch.float64)).sum().backward()
    found = {name: value.grad for name, value in head.named_parameters() if value.grad is not None}
    assert features.grad is not None
    return found | {"features": features.grad}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("kind", "changes"), [*((kind, {}) for kind in CONFIGS), ("mistral", {"sliding_window": 2})]
)
def test_every_place_computes_what_drafting_from_it_does(
    kind: str, changes: dict[str, Any], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients, of packed texts, in blocks of rows, with windows shorter than the texts or the steps."""
    monkeypatch.setattr(head_map, "CPU_CHUNK_BYTES", 3 * 4 * 3 * 4 * 8)
    made, embedded, features, positions = some_inputs(kind, head, tiny_model(kind, **changes))
    compare(made, embedded, features, positions)


@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_whole_texts_are_attended_to_by_one_kernel(
    kind: str, head: str, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients, where no place is hidden but those after it, whether or not positions say so."""
    model = tiny_model(kind)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    made, embedded, features, _ = some_inputs(kind, head, model)
    monkeypatch.delattr(unrolled_module, "_rows")  # what attends otherwise
    compare(made, embedded, features, torch.arange(8).expand(3, -1) if is_told else None)


def test_that_kernel_takes_any_layout() -> None:
    """Keys, values and queries whose heads' numbers lie apart."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(5, 1, 2, 8, 16, dtype=torch.float64, generator=generator)
    expected = MergedAttention.apply(*parts[:3], 0.3, *parts[3:])
    apart = [part.mT.contiguous().mT for part in parts]
    torch.testing.assert_close(MergedAttention.apply(*apart[:3], 0.3, *apart[3:]), expected)


@torch.no_grad()
def test_that_kernel_runs_under_autocast() -> None:
    """Where queries and values have several dtypes."""
    model = tiny_model("llama").float()
    made, embedded, features, _ = some_inputs("llama", "eagle3", model)
    inputs = embedded.float(), features.float(), None
    made.float()
    expected = torch.stack(list(unrolled(made, *inputs, STEPS)))
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.stack(list(unrolled(made, *inputs, STEPS)))
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


def compare(head: Head, embedded: Tensor, features: Tensor, positions: Tensor | None) -> None:
    """With the naive twin: outputs, and gradients of all parts."""
    actual = torch.stack(list(unrolled(head, embedded, features, positions, STEPS)))
    of_actual = gradients(head, features, actual)
    if positions is None:
        positions = torch.arange(features.shape[1]).expand(len(features), -1)
    each = naive(head, embedded, features, positions)
    expected = torch.stack([torch.stack([torch.stack(row) for row in step]) for step in each])
    of_expected = gradients(head, features, expected)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert of_actual.keys() == of_expected.keys()
    for name, value in of_actual.items():
        difference, size = (value - of_expected[name]).abs().max(), of_expected[name].abs().max()
        assert difference <= 1e-4 * size, f"{name}: {difference} of {size}"


class Appending:
    """The simplest cache; what is appended after `committed` places can be taken back."""

    def __init__(self) -> None:
        self.keys, self.values = torch.empty(0), torch.empty(0)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        if self.keys.numel():
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def cut(self, committed: int) -> None:
        self.keys, self.values = self.keys[:, :, :committed], self.values[:, :, :committed]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3"])
@torch.no_grad()
def test_over_a_cache_a_head_computes_what_it_did_in_training(kind: str, head: str, fused: bool) -> None:
    """Place by place: commit it with its features, draft a chain on the head's own outputs, take that back."""
    model = tiny_model(kind)
    backbone = Backbone(model)
    made = some_head(head, model)
    tokens = torch.randint(64, (1, 13), generator=torch.Generator().manual_seed(4))
    embedded = backbone.embed(tokens[:, 1:])
    features = torch.randn(1, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = list(unrolled(made, embedded, features, torch.arange(12)[None], STEPS))
    _, windows = attention_kinds(backbone.config, backbone.num_layers)
    layer, dtype = made.layer, features.dtype
    runner = LayerRunner(
        backbone,
        [layer.layer],
        [layer.kind],
        {layer.kind: windows[layer.kind]},
        device=tokens.device,
        dtype=dtype,
        fuse_layers=fused,
    )
    cache, tables = Appending(), runner.tables(32, 32)
    for t in range(12 - STEPS):
        output = features[:, t : t + 1]
        for step in range(STEPS):
            inputs = made.inputs(embedded[:, t + step : t + step + 1], output)
            output = runner.run(inputs, 0, 1, runner.span(cache, tables, t + step, 1))
            torch.testing.assert_close(output[:, 0], expected[step][:, t], rtol=TOLERANCE, atol=TOLERANCE)
        cache.cut(t + 1)


def parts(weights: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
    """One linear map."""
    return inputs @ weights[f"{name}.weight"].T


def normed(weights: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
    """Llama's norm."""
    return inputs / (inputs.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_the_layer_is_that_of_the_paper(head: str) -> None:
    """Written out for one place, which sees itself alone, so that its attention is its value."""
    model = tiny_model("llama")
    made = some_head(head, model)
    own = dict(made.named_parameters())
    embedded, features = torch.randn(
        2, 1, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    if head == "eagle":
        hidden = torch.cat((embedded, features), dim=-1) @ own["fc.weight"].T + own["fc.bias"]
        attends, prefix, attention = hidden, "layer.layer", "layer.layer.self_attn"
    else:
        hidden, prefix, joined = features, "layer.layer.layer", "layer.layer.layer.self_attn"
        norms = (f"{joined}.input_layernorm", embedded), (f"{joined}.hidden_norm", features)
        attends = torch.cat([normed(own, name, inputs) for name, inputs in norms], dim=-1)
        attention = f"{joined}.attention"
    value = parts(own, f"{attention}.v_proj", attends).view(2, 8).repeat_interleave(2, dim=0).view(1, 1, 32)
    hidden = hidden + parts(own, f"{attention}.o_proj", value)
    inner = normed(own, f"{prefix}.post_attention_layernorm", hidden)
    gate, up = (parts(own, f"{prefix}.mlp.{name}_proj", inner) for name in ("gate", "up"))
    hidden = hidden + parts(own, f"{prefix}.mlp.down_proj", torch.nn.functional.silu(gate) * up)
    output = made.layer(made.inputs(embedded, features), torch.zeros(1, 1, dtype=torch.long))
    torch.testing.assert_close(output, hidden, rtol=TOLERANCE, atol=TOLERANCE)
    says = hidden @ model.lm_head.weight.T
    if head == "eagle3":
        says = normed(own, "norm", hidden) @ own["projection.weight"].T
    torch.testing.assert_close(made.logits(output), says, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_target_attends_as_before() -> None:
    """What changes while steps are unrolled is the head's own configuration."""
    model = tiny_model("llama")
    made, embedded, features, positions = some_inputs("llama", "eagle", model=model)
    seen = []
    made.layer.layer.get_submodule("self_attn.o_proj").register_forward_pre_hook(
        lambda *_: seen.append(model.model.layers[0].self_attn.config._attn_implementation)
    )
    assert len(list(unrolled(made, embedded, features, positions, STEPS))) == STEPS
    assert seen == ["sdpa"] * STEPS
