"""Weights that are not all there as floats on one device: on disk until they are used, or quantized."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from layerskip_model.backbone import Backbone, model_device
from layerskip_model.early_exit import EarlyExitModel
from layerskip_model.errors import UserError
from layerskip_model.formats import huggingface
from layerskip_model.formats.huggingface import has_plain_weights, load_model
from layerskip_model.runner import Runner
from tests.layerskip_model.small import batch, exit_loss
from tests.tiny_models import tiny_model

PARTS = ("model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "lm_head")
ON_DISK = {
    "some layers": ("model.layers.1", "model.layers.3"),
    "embedding": ("model.embed_tokens",),
    "head": ("model.norm", "lm_head"),
    "all": PARTS,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("saved")
    tiny_model(dtype=torch.float32).save_pretrained(directory)
    return str(directory)


def device_map(name: str) -> dict[str, Any]:
    on_disk = ON_DISK[name]
    return {part: "disk" if part in on_disk else "cpu" for part in PARTS} | {"model.rotary_emb": "cpu"}


@pytest.mark.parametrize("name", ON_DISK)
def test_weights_on_disk_give_the_logits_of_weights_in_memory(saved: str, name: str) -> None:
    plain = load_model(saved, dtype="float64")
    spread = load_model(saved, dtype="float64", device_map=device_map(name))
    assert has_plain_weights(plain)
    assert not has_plain_weights(spread)
    assert model_device(spread) == Runner(spread).device == torch.device("cpu")
    hidden = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual, expected = (Backbone(model).logits(hidden) for model in (spread, plain))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert sum(parameter.is_meta for parameter in spread.parameters()) > 0  # and they went again


@pytest.mark.parametrize("name", ON_DISK)
def test_exits_are_measured_with_weights_on_disk(saved: str, name: str) -> None:
    inputs, labels = batch(rows=3)
    found = []
    for where in (None, device_map(name)):
        model = load_model(saved, dtype="float64", device_map=where)
        with torch.no_grad():
            found.append(EarlyExitModel(model, exit_loss(), None).eval()(inputs, labels, [0, 1, 2], 0))
    assert found[0].cross_entropy.keys() == found[1].cross_entropy.keys()
    for layer, nats in found[0].cross_entropy.items():
        torch.testing.assert_close(found[1].cross_entropy[layer], nats, rtol=1e-6, atol=0)


@pytest.mark.parametrize("where", ["auto", "balanced", "sequential", torch.device("cpu")])
def test_every_kind_of_map_is_passed_on(saved: str, where: str | torch.device) -> None:
    model = load_model(saved, device_map=where)
    assert has_plain_weights(model)  # there is one device, and the model fits
    torch.testing.assert_close(model.state_dict(), load_model(saved).state_dict(), rtol=0, atol=0)


def test_damaged_weights_are_refused_wherever_they_go(saved: str, tmp_path: Path) -> None:
    config = json.loads((Path(saved) / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(Path(saved) / "model.safetensors")
    with pytest.raises(UserError, match=r"no place for: 'model.layers.3"):
        load_model(str(tmp_path), device_map="auto")


def test_a_model_without_weights_is_where_it_is() -> None:
    with torch.device("meta"):
        assert model_device(nn.Linear(2, 2)) == torch.device("meta")


# --- quantized ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", huggingface.QUANTIZATIONS)
def test_what_transformers_is_told_of_a_quantization(
    saved: str, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    def load(name: str, **how: Any) -> Any:
        told.update(how)
        return tiny_model(), {"mismatched_keys": [], "missing_keys": [], "unexpected_keys": []}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    load_model(saved, dtype="bfloat16", device_map="auto", quantization=quantization)
    config = told["quantization_config"]
    assert isinstance(config, BitsAndBytesConfig)
    assert (config.load_in_4bit, config.load_in_8bit) == (quantization == "4bit", quantization == "8bit")
    assert (told["dtype"], told["device_map"]) == (torch.bfloat16, "auto")
    if quantization == "4bit":
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)


def test_a_quantized_checkpoint_is_not_quantized_again(saved: str, tmp_path: Path) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = json.loads((Path(saved) / "config.json").read_text()) | {"quantization_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is stored quantized already; load it without quantization"):
        load_model(str(tmp_path), quantization="4bit")


def test_quantized_weights_are_not_plain() -> None:
    model = tiny_model()
    assert has_plain_weights(model)
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    assert not has_plain_weights(model)


def test_quantization_without_bitsandbytes_is_one_line(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="bitsandbytes") as caught:
        load_model(saved, quantization="8bit")
    assert "\n" not in str(caught.value)


def test_the_head_is_called_and_not_read() -> None:
    """A quantized head computes by itself; its weight is no matrix of [vocab, hidden]."""

    class Packed(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden)

    model = tiny_model("gemma2")
    plain: Any = model.lm_head
    packed = Packed(plain.in_features, plain.out_features, bias=False, dtype=torch.float64)
    packed.weight = plain.weight
    backbone = Backbone(model)
    hidden = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = backbone.head_map().squash(2 * plain(backbone.norm(hidden)))
    model.lm_head = packed
    torch.testing.assert_close(Backbone(model).logits(hidden), expected, rtol=0, atol=0)
