"""The view of a model: the same numbers as the model's own, and nothing left behind on it."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.cohere import CohereConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.granite import GraniteConfig
from transformers.models.opt import OPTConfig

from layerskip_model.backbone import Backbone, model_device
from layerskip_model.early_exit import EarlyExitModel, ExitLoss
from layerskip_model.errors import UserError
from layerskip_model.head_map import HeadMap
from tests.tiny_models import CONFIGS, tiny_model

TOLERANCE = 1e-5  # norms of float64 models compute in float32
TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(5))
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALED = {
    "granite": GraniteConfig(
        **SIZES, logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=0.22
    ),
    "cohere": CohereConfig(**SIZES, logit_scale=0.5),
}


def model_of(kind: str) -> PreTrainedModel:
    if kind in CONFIGS:
        return tiny_model(kind)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SCALED[kind], dtype=torch.float64)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(15)
    return model.eval()


def plain(layers: int = 4) -> ExitLoss:
    return ExitLoss(layers, 1, list(range(1, layers)), "uniform", e_scale=1.0, curriculum="none", every=1)


ALL_KINDS = [*CONFIGS, *SCALED]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_last_exits_logits_are_the_models(kind: str) -> None:
    """Scale, soft cap and tied heads included: Granite divides, Cohere multiplies, Gemma caps."""
    model = model_of(kind)
    backbone = Backbone(model)
    with torch.no_grad():
        output = model(input_ids=TOKENS, output_hidden_states=True)
        final = backbone.final_states(TOKENS)
        actual = backbone.at_head(final, lambda hidden, head: head.logits(hidden))
    torch.testing.assert_close(actual, output.logits, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(final, output.hidden_states[-1])
    torch.testing.assert_close(backbone.embed(TOKENS).shape, output.hidden_states[0].shape)
    assert backbone.num_layers == 4
    assert output.logits.std() > 0.2  # far enough from zero for a wrong scale to show


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_exits_read_the_states_that_leave_the_layers(kind: str) -> None:
    """The intercepted states are output_hidden_states of the model; g of the last is its logits."""
    model = model_of(kind)
    backbone = Backbone(model)
    seen: dict[int, Tensor] = {}

    def around(index: int, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen[index] = call(*args, **kwargs)
        return seen[index]

    with torch.no_grad():
        expected = model(input_ids=TOKENS, output_hidden_states=True)
        backbone.intercept_layers(around)
        backbone.final_states(TOKENS)
        backbone.release_layers()
        for index in range(3):
            assert torch.equal(seen[index], expected.hidden_states[index + 1])
        torch.testing.assert_close(backbone.logits(seen[3]), expected.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_model_is_what_it_was(kind: str, tmp_path: Path) -> None:
    """Bitwise the same forward, the same names and the same files, with an EarlyExitModel around and after."""
    model = model_of(kind)
    expected = model(input_ids=TOKENS, output_hidden_states=True)
    model.save_pretrained(tmp_path / "before")
    names, settings = list(model.state_dict()), model.config.to_dict()
    attributes = [set(module.__dict__) for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    module = EarlyExitModel(model, plain(), None)
    assert model.training is False  # checking the model does not switch it
    for moment in ("around", "released"):
        actual = model(input_ids=TOKENS, output_hidden_states=True)
        assert torch.equal(actual.logits, expected.logits)
        assert all(
            torch.equal(*pair) for pair in zip(actual.hidden_states, expected.hidden_states, strict=True)
        )
        assert list(model.state_dict()) == names
        assert model.config.to_dict() == settings
        model.save_pretrained(tmp_path / moment)
        before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("before", moment))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        for file in ("config.json", "generation_config.json"):
            assert (tmp_path / "before" / file).read_bytes() == (tmp_path / moment / file).read_bytes()
        assert [name for name, _ in module.named_parameters()] == [
            f"model.{name}" for name, _ in model.named_parameters()
        ]
        if moment == "around":
            module.backbone.release_layers()
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_interceptions_nest_and_come_off_in_turn() -> None:
    """Measuring the exits of a model that is being trained leaves the training's interception in place."""
    model = tiny_model()
    outer, inner = Backbone(model), Backbone(model)
    calls: list[str] = []

    def around(name: str) -> Any:
        def run(index: int, call: Any, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(f"{name}{index}")
            return call(*args, **kwargs)

        return run

    outer.intercept_layers(around("outer"))
    inner.intercept_layers(around("inner"))
    expected = tiny_model()(input_ids=TOKENS).logits
    assert torch.equal(model(input_ids=TOKENS).logits, expected)
    assert calls == [f"{name}{index}" for index in range(4) for name in ("inner", "outer")]
    with pytest.raises(ValueError, match="last first"):
        outer.release_layers()
    with pytest.raises(ValueError, match="already"):
        inner.intercept_layers(around("again"))
    inner.release_layers()
    calls.clear()
    model(input_ids=TOKENS)
    assert calls == [f"outer{index}" for index in range(4)]
    outer.release_layers()
    outer.release_layers()  # nothing more to do
    calls.clear()
    assert torch.equal(model(input_ids=TOKENS).logits, expected)
    assert calls == []


def test_deepcopies_of_an_intercepted_model_run_their_own_layers() -> None:
    model = tiny_model()
    module = EarlyExitModel(model, plain(), None).train()
    expected = model(input_ids=TOKENS).logits
    other = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    assert torch.equal(other(input_ids=TOKENS).logits, expected)
    assert not torch.equal(model(input_ids=TOKENS).logits, expected)
    module.backbone.release_layers()
    for layer in other.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    assert torch.equal(other(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_an_intercepted_model_can_be_pickled() -> None:
    model = tiny_model()
    EarlyExitModel(model, plain(), None)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_at_head_runs_inside_the_heads_forward_and_leaves_it_alone() -> None:
    model = tiny_model()
    backbone = Backbone(model)
    order: list[str] = []
    backbone.head.register_forward_pre_hook(lambda *args: order.append("gather"))
    backbone.head.register_forward_hook(lambda *args: order.append("release"))

    def compute(hidden: Tensor, head: HeadMap) -> tuple[str, bool]:
        order.append("compute")
        return "any result", head.weight is backbone.head.weight

    hidden = torch.zeros(3, 32, dtype=torch.float64)
    assert backbone.at_head(hidden, compute) == ("any result", True)
    assert order == ["gather", "compute", "release"]
    assert "forward" not in backbone.head.__dict__
    with pytest.raises(ZeroDivisionError):
        backbone.at_head(hidden, lambda hidden, head: 1 / 0)
    assert "forward" not in backbone.head.__dict__
    own = lambda hidden: hidden  # noqa: E731
    backbone.head.forward = own  # type: ignore[method-assign]
    backbone.at_head(hidden, compute)
    assert backbone.head.__dict__["forward"] is own


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=64),
        OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_attention_heads=4,
            num_hidden_layers=1,
            vocab_size=64,
            do_layer_norm_before=False,
        ),
    ],
)
def test_models_built_otherwise_are_refused(config: Any) -> None:
    with pytest.raises(UserError, match=f"model type '{config.model_type}' has no decoder layers") as caught:
        Backbone(AutoModelForCausalLM.from_config(config))
    assert "\n" not in str(caught.value)


class Doubling(nn.Linear):
    """A head that does what no configuration key tells."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_a_head_that_does_more_than_is_known_is_refused() -> None:
    model = tiny_model()
    model.lm_head.__class__ = Doubling
    with pytest.raises(UserError, match="changes its logits") as caught:
        EarlyExitModel(model, plain(), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cap", [3.0, 300.0])  # the second far above the logits of two random tokens
def test_a_soft_cap_that_is_not_read_is_noticed(cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2", dtype=torch.float32, final_logit_softcapping=cap)
    Backbone(model).check()
    monkeypatch.setattr(Backbone, "head_map", lambda self: HeadMap(self.head.weight))
    with pytest.raises(UserError, match="changes its logits"):
        Backbone(model).check()


def test_something_after_the_final_norm_is_refused() -> None:
    model = tiny_model()

    def shift(module: nn.Module, args: Any, output: Any) -> None:
        output.last_hidden_state = output.last_hidden_state + 1

    model.model.register_forward_hook(shift)
    with pytest.raises(UserError, match="more between its last layer and its LM head"):
        EarlyExitModel(model, plain(), None)


def test_layers_that_return_more_than_hidden_states_are_refused() -> None:
    model = tiny_model()
    model.model.layers[-1].register_forward_hook(lambda module, args, output: (output, None))
    model.model.norm.register_forward_pre_hook(
        lambda module, args: args[0][0] if isinstance(args[0], tuple) else None
    )
    with pytest.raises(UserError, match="model type 'llama'"):
        EarlyExitModel(model, plain(), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_rounding_passes_the_check(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind, dtype=dtype)
    random = torch.get_rng_state()
    Backbone(model.train()).check()
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)


def test_attention_that_needs_a_gpu_does_not_run_in_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is checked where it was loaded: on the CPU, in float32."""
    model = tiny_model()
    model.config._attn_implementation_internal = "flash_attention_2"

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("FlashAttention only supports GPUs")

    monkeypatch.setattr(model, "forward", refuse)
    Backbone(model).check()
    assert model.config._attn_implementation == "flash_attention_2"


def test_model_device() -> None:
    assert model_device(tiny_model()) == torch.device("cpu")
