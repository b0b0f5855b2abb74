"""The count of FLOPs against what torch counts while a step runs."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from layerskip_model.early_exit import EarlyExitModel
from layerskip_model.token_loss import IGNORE_INDEX
from tests.layerskip_model.small import batch, exit_loss, half_dropped
from tests.tiny_models import tiny_model
from train import flops
from train.flops import PEAK_FLOPS, model_flops, peak_flops


def counted(work: Any) -> int:
    def of_addmm(total: list[int], left: list[int], right: list[int], *_: Any, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    # torch leaves the product out that adds in place
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: of_addmm}) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_a_step_is_what_torch_counts(kind: str) -> None:
    """With dropped rows, several exits and labels that do not count; sdpa's products torch does not count here."""
    model = tiny_model(kind, attention="eager")
    inputs, labels = batch()
    rate, loss, step = half_dropped(), exit_loss(), 6
    module = EarlyExitModel(model, loss, rate).train()
    actual = counted(lambda: module(inputs, labels, range(6), step).weighted_sum().backward())
    kept = rate.kept(step, range(6)).sum(axis=1)
    assert kept.min() < 6
    predicted = int((labels != IGNORE_INDEX).sum())
    assert actual == model_flops(model).step(kept.tolist(), 9, len(loss.at(step)), predicted)


def test_recomputed_layers_are_what_torch_counts_more() -> None:
    inputs = batch()[0]
    model = tiny_model(attention="eager").train()
    totals = [counted(lambda: model(input_ids=inputs).logits.sum().backward())]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    totals.append(counted(lambda: model(input_ids=inputs).logits.sum().backward()))
    # The recomputation stops when it has all that backward needs: without the last map, [48, 32] here.
    last = 2 * 48 * 32 * inputs.numel() * 4
    assert totals[1] - totals[0] == model_flops(model).recomputed([6] * 4, 9) - last


def test_frozen_maps_cost_a_third_less_and_adapters_count() -> None:
    model = tiny_model()
    whole = model_flops(model)
    with torch.device("meta"):
        assert model_flops(AutoModelForCausalLM.from_config(model.config)) == whole
    model.requires_grad_(False)
    frozen = model_flops(model)
    assert frozen.layers == tuple(cost * 4 / 6 for cost in whole.layers)
    assert frozen.head == whole.head * 4 / 6
    assert (frozen.attention, frozen.forward_layers) == (whole.attention, whole.forward_layers)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    assert model_flops(model).layers == tuple(cost + 6 * (2 * 32 + 2 * 32) for cost in frozen.layers)


def test_peaks_of_known_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, low = torch.device("cuda"), torch.bfloat16
    assert peak_flops(torch.device("cpu"), low) is None
    for name, peak in {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A10G": 70e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "Some other GPU": None,
    }.items():
        monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda, low) == peak
    assert peak_flops(cuda, torch.float32) is None
    for known in PEAK_FLOPS:
        assert next(name for name in PEAK_FLOPS if name in known) == known, "a shorter name comes before it"
