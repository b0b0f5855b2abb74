"""Adapters: what they freeze, what they compute, and that merging them gives the same model without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from layerskip_model.early_exit import EarlyExitModel
from layerskip_model.errors import UserError
from layerskip_model.lora import add_lora, has_lora, merged_state
from tests.layerskip_model.small import batch, exit_loss
from tests.tiny_models import tiny_model

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
TOKENS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(5))


def adapted(kind: str = "llama", targets: Any = "all-linear", **changes: Any) -> PreTrainedModel:
    """A tiny model whose adapters have learnt something: B is no longer zero."""
    model = tiny_model(kind, **({"dtype": torch.float32} | changes))
    add_lora(model, rank=3, alpha=6.0, dropout=0.0, targets=targets)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def names_of_trained(model: PreTrainedModel) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_only_the_adapters_train_in_float32() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(dtype=dtype)
        trained = names_of_trained(model)
        assert len(trained) == 2 * 7 * 4
        assert all(".lora_A." in name or ".lora_B." in name for name in trained)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if name in trained else dtype), name
    assert has_lora(model)
    assert not has_lora(tiny_model())


def test_a_new_adapter_changes_nothing() -> None:
    model = tiny_model(dtype=torch.float32)
    expected = model(TOKENS).logits
    add_lora(model, rank=4, alpha=8.0, dropout=0.5, targets="all-linear")
    assert torch.equal(model.eval()(TOKENS).logits, expected)


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "down_proj"]])
def test_targets_are_names_of_modules_in_the_layers(targets: list[str]) -> None:
    trained = names_of_trained(adapted(targets=targets))
    assert {name.split(".")[-4] for name in trained} == set(targets)
    assert len(trained) == 2 * 4 * len(targets)


@pytest.mark.parametrize("target", ["qkv_proj", "lm_head", "embed_tokens", "self_attn"])
def test_a_target_that_matches_nothing_is_named(target: str) -> None:
    model = tiny_model()
    with pytest.raises(UserError) as caught:
        add_lora(model, rank=4, alpha=8.0, dropout=0.0, targets=["q_proj", target])
    assert str(caught.value) == (
        f"model.lora.targets: '{target}' is no linear map of this model's decoder layers; "
        f"there are {', '.join(ALL)}, or use all-linear"
    )
    assert not has_lora(model)


def test_without_peft_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^model\.lora: the peft package is not installed; pip install peft"):
        add_lora(tiny_model(), rank=4, alpha=8.0, dropout=0.0, targets="all-linear")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3"])
def test_the_merged_model_computes_what_the_adapted_one_does(kind: str) -> None:
    model = adapted(kind)
    state = model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    plain = tiny_model(kind, dtype=torch.float32)
    base = plain(TOKENS).logits
    plain.load_state_dict(merged_state(model, state))  # strict: exactly the plain model's names
    expected = model(TOKENS).logits
    torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    assert (base - expected).abs().max() > 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_biases_and_the_scale_come_along() -> None:
    model = adapted(attention_bias=True, targets=["q_proj"])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    state = model.state_dict()
    merged = merged_state(model, state)
    path = "model.layers.1.self_attn.q_proj"
    a, b = (state[f"{path}.lora_{part}.default.weight"] for part in "AB")  # [rank, in], [out, rank]
    naive = state[f"{path}.base_layer.weight"] + 2.0 * torch.einsum("or,ri->oi", b, a)
    torch.testing.assert_close(merged[f"{path}.weight"], naive)
    assert torch.equal(merged[f"{path}.bias"], state[f"{path}.base_layer.bias"])


def test_the_early_exit_loss_trains_the_adapters_and_nothing_else() -> None:
    model = adapted(dtype=torch.bfloat16)
    module = EarlyExitModel(model, exit_loss(), None).train()
    inputs, labels = batch()
    loss: Tensor = module(inputs, labels, range(len(inputs)), 0).weighted_sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_the_merged_model_needs_no_peft(tmp_path: Path) -> None:
    from train.export import export_model

    model = adapted()
    export_model(model, model.state_dict(), tmp_path, torch.float32)
    torch.save(model(TOKENS).logits, tmp_path / "expected.pt")
    code = (
        "import sys, torch; sys.modules['peft'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        f"expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"logits = model(torch.tensor({TOKENS.tolist()})).logits\n"
        "torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, report = both
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded).__name__ == "LlamaForCausalLM"
