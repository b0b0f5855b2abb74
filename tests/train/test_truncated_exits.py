"""An exit's logits are those of the model cut off after it, for the special parts of real architectures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from layerskip_model.early_exit import EarlyExitModel, ExitLoss
from train.architectures import ARCHITECTURES

LAYERS = 4
TOKENS = torch.randint(96, (2, 14), generator=torch.Generator().manual_seed(3))  # [batch, seq]
SMALL: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
# Small enough that they change what these sizes compute.
TIGHT = {
    "sliding_window": 5,
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 0.5,
    "query_pre_attn_scalar": 8,
}
NAMES = ["llama-3.2-1b", "qwen3-0.6b", "gemma-2-2b"]


def small(name: str, **changes: Any) -> PreTrainedModel:
    """The architecture with its own ties, caps, windows and rotary settings, and weights far from uniform."""
    own = dict(ARCHITECTURES[name])
    tight = {key: value for key, value in TIGHT.items() if key in own}
    config = AutoConfig.for_model(own.pop("model_type"), **(own | SMALL | tight | changes))
    config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.4, generator=generator)
    return model.eval()


def truncated(model: PreTrainedModel, exit_layer: int) -> PreTrainedModel:
    """A model of its own with the first layers of another, the same norm and the same head."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = exit_layer
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:exit_layer]
    cut = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    report = cut.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys
    return cut.eval()


def exit_logits(model: PreTrainedModel) -> dict[int, Tensor]:
    """Each exit's logits [batch, seq, vocab] as the module around the model makes them in evaluation."""
    module = EarlyExitModel(model, ExitLoss(LAYERS, 9, [1, 2, 3], "uniform", 1.0, "none", 1), None).eval()
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda m, a, output: seen.append(output))
        for layer in module.backbone.layers
    ]
    labels = TOKENS.roll(-1, 1)
    terms = module(TOKENS, labels, range(len(TOKENS)), 0)
    for hook in hooks:
        hook.remove()
    logits = {e: module.backbone.logits(state) for e, state in enumerate(seen, start=1)}
    for e, cross_entropy in terms.cross_entropy.items():  # and those are what it measures
        naive = functional.cross_entropy(logits[e].flatten(0, 1), labels.flatten(), reduction="sum")
        torch.testing.assert_close(cross_entropy.double(), naive, rtol=1e-5, atol=1e-5)
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_an_exit_is_the_truncated_model(name: str) -> None:
    with torch.no_grad():
        model = small(name)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
            model.config.tie_word_embeddings
        )
        for exit_layer, logits in exit_logits(model).items():
            expected = truncated(model, exit_layer)(TOKENS).logits
            torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gemma-2-2b", "sliding_window", 64),
        ("gemma-2-2b", "attn_logit_softcapping", 50.0),
        ("gemma-2-2b", "final_logit_softcapping", 30.0),
        ("llama-3.2-1b", "rope_parameters", {"rope_theta": 10000.0, "rope_type": "default"}),
        ("qwen3-0.6b", "rope_parameters", {"rope_theta": 10000.0, "rope_type": "default"}),
    ],
)
def test_the_special_parts_matter_at_every_exit(name: str, key: str, value: Any) -> None:
    """Otherwise the test above would pass without them."""
    with torch.no_grad():
        usual, changed = exit_logits(small(name)), exit_logits(small(name, **{key: value}))
        for exit_layer, logits in usual.items():
            assert (logits - changed[exit_layer]).abs().max() > 1e-3, exit_layer
