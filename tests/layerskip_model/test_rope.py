"""RoPE of a head's own, against models that have it themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from layerskip_model.backbone import Backbone
from layerskip_model.draft_layer import DraftLayer
from layerskip_model.eagle import unrolled
from layerskip_model.rope import PARTIAL, Rope, plain_rope, rope_of, rope_words, spoken_rope
from tests.layerskip_model.test_draft_layer import PACKED, TOKENS
from tests.layerskip_model.test_eagle_format import LLAMA3
from tests.layerskip_model.test_unrolled import STEPS, some_inputs
from tests.layerskip_model.tiny_eagle import Head
from tests.tiny_models import CONFIGS, tiny_model

DEFAULT = {"rope_theta": 10000.0, "rope_type": "default"}
OWN: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 77.0, "rope_type": "default"},
    "linear": {"rope_theta": 500.0, "rope_type": "linear", "factor": 3.0},
    "llama3": {**LLAMA3, "rope_theta": 100.0},
    "yarn": {"rope_theta": 50.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}
"""One of each type that a head may have."""
LIKE = torch.empty(0, dtype=torch.float64)


def model_with(kind: str, parameters: dict[str, Any], **changes: Any) -> Backbone:
    """A model that turns so in every layer."""
    rope: dict[str, Any] = dict(parameters)
    if kind == "gemma3":
        rope = {name: dict(parameters) for name in ("full_attention", "sliding_attention")}
    return Backbone(tiny_model(kind, rope_parameters=rope, **changes))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, DEFAULT),
        ({"rope_theta": 5e5}, DEFAULT | {"rope_theta": 5e5}),
        ({"rope_theta": None, "rope_scaling": None, "rope_parameters": None}, DEFAULT),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            DEFAULT | {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
            LLAMA3,
        ),
        ({"rope_parameters": LLAMA3, "rope_theta": 3.0}, LLAMA3),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 64},
            DEFAULT | {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        ),
        ({"rope_parameters": {"full_attention": LLAMA3, "sliding_attention": DEFAULT}}, LLAMA3),
        ({"partial_rotary_factor": 0.5}, DEFAULT | {"partial_rotary_factor": 0.5}),
        ({"rope_parameters": DEFAULT | {"partial_rotary_factor": 1.0, "factor": None}}, DEFAULT),
    ],
)
def test_a_configuration_in_any_words(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert rope_of(config, "full_attention") == expected
    assert rope_of(rope_words(expected), "full_attention") == expected  # in all words at once
    old = rope_words(expected) | {"rope_parameters": None, "partial_rotary_factor": expected.get(PARTIAL)}
    assert rope_of(old, "full_attention") == expected


def test_in_one_line() -> None:
    assert spoken_rope(DEFAULT | {"rope_theta": 1e6}) == "base 1e+06, rope_type default"
    assert spoken_rope({"rope_theta": "much", "rope_type": "x"}) == "base 'much', rope_type x"
    assert plain_rope(LLAMA3) == DEFAULT
    assert plain_rope(LLAMA3 | {"partial_rotary_factor": 0.5}) == DEFAULT | {"partial_rotary_factor": 0.5}


@pytest.mark.parametrize("own", OWN)
def test_tables_are_those_of_a_llama_with_that_configuration(own: str) -> None:
    """Whatever the target's are; also for one without values, and after a copy."""
    config = LlamaConfig(head_dim=8, max_position_embeddings=128, rope_parameters=dict(OWN[own]))
    positions = torch.tensor([[0, 1, 5, 100, 4000]])
    expected = LlamaRotaryEmbedding(config)(LIKE, positions)
    with torch.device("meta"):
        empty = Backbone(tiny_model(rope_parameters=dict(LLAMA3)))
    for backbone in (Backbone(tiny_model(rope_parameters=dict(LLAMA3))), empty):
        rope = Rope(backbone, OWN[own])
        for made in (rope, copy.deepcopy(rope)):
            tables = made.rotary(LIKE, positions, "full_attention")
            assert all(torch.equal(*pair) for pair in zip(tables, expected, strict=True))
        assert backbone.config.rope_parameters == LLAMA3
    assert not torch.equal(expected[0], LlamaRotaryEmbedding(LlamaConfig(head_dim=8))(LIKE, positions)[0])


@pytest.mark.parametrize(
    ("kind", "own"),
    # Phi-3 has no other that a head may have.
    [(kind, own) for kind in CONFIGS for own in OWN if kind != "phi3" or own == "default"],
)
def test_a_layer_computes_what_a_model_with_its_rope_does(kind: str, own: str) -> None:
    """The twin is that model's own forward; its target has another RoPE."""
    twin = model_with(kind, OWN[own], num_hidden_layers=1)
    backbone = Backbone(tiny_model(kind, num_hidden_layers=1))
    layer = DraftLayer(backbone).double()
    layer.layer.load_state_dict(twin.layers[0].state_dict())
    with torch.no_grad():
        entering, expected = twin.embed(TOKENS), twin.final_states(TOKENS, PACKED)
        assert not torch.allclose(twin.norm(layer(entering, PACKED)), expected)
        layer.rope = Rope(backbone, OWN[own])
        assert torch.equal(twin.norm(layer(entering, PACKED)), expected)


@pytest.mark.parametrize("head", ["eagle", "eagle3"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_later_steps_turn_so_too(kind: str, head: str) -> None:
    """The twin is the same head on a model that has the RoPE itself."""
    twin = model_with(kind, OWN["llama3"])
    expected = _unrolled(*some_inputs(kind, head, twin.model))
    made, *rest = some_inputs(kind, head)
    assert not torch.allclose(_unrolled(made, *rest)[1:], expected[1:])
    made.layer.rope = Rope(Backbone(tiny_model(kind)), OWN["llama3"])
    assert torch.equal(_unrolled(made, *rest), expected)


def _unrolled(head: Head, *given: Tensor) -> Tensor:
    embedded, features, positions = given
    return torch.stack(list(unrolled(head, embedded, features, positions, STEPS))).detach()


def test_frequencies_are_not_rounded_with_the_weights() -> None:
    """A head in half precision turns far positions as exactly as one in full."""
    backbone = Backbone(tiny_model())
    layer = DraftLayer(backbone)
    layer.rope = Rope(backbone, OWN["default"])
    far = torch.arange(1000, 1010)[None]
    before = layer.rotary(LIKE, far)
    layer.to(torch.bfloat16)
    assert all(torch.equal(*pair) for pair in zip(layer.rotary(LIKE, far), before, strict=True))
    assert {name.split(".")[0] for name in layer.state_dict()} == {"layer"}
