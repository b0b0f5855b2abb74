"""What is exported is a plain checkpoint: the state that was gathered, rounded, each tensor once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from layerskip_model.formats.huggingface import load_model
from tests.tiny_models import tiny_model
from train.export import export_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_loaded_as_it_was_rounded(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=tied)
    state = {
        name: tensor.clone() for name, tensor in model.state_dict().items()
    }  # an engine gathers them apart
    export_model(model, state, tmp_path, dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name].to(dtype)), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    load_model(str(tmp_path))  # refuses missing and unexpected weights


def test_the_module_s_own_weights_are_not_read(tmp_path: Path) -> None:
    model = tiny_model("gemma2", dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0)  # as where an engine has sharded them
    config = model.config.to_dict()
    export_model(model, state, tmp_path, torch.float32)
    assert model.config.to_dict() == config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.architectures == ["Gemma2ForCausalLM"]
