"""Loading: what a user gets, and the one line for everything that cannot be loaded."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import DTYPES, load_model, load_tokenizer, new_model, one_line
from tests.tiny_models import tiny_model

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "good"
    tiny_model(dtype=torch.float32, tie_word_embeddings=True).save_pretrained(directory)
    return directory


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(saved, tmp_path / "checkpoint")


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# --- what is good ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_in_every_dtype(saved: Path, dtype: str) -> None:
    model = load_model(str(saved), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[dtype]}
    assert not model.training
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected: Any = tiny_model(dtype=torch.float32, tie_word_embeddings=True)
    torch.testing.assert_close(model.state_dict(), expected.to(DTYPES[dtype]).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_implementation_is_passed_on(saved: Path, attention: str) -> None:
    assert load_model(str(saved), attn_implementation=attention).config._attn_implementation == attention
    assert new_model(SMALL, attn_implementation=attention).config._attn_implementation == attention


def test_a_tokenizer(tmp_path: Path) -> None:
    backend = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert load_tokenizer(str(tmp_path)).get_vocab() == {"a": 0, "b": 1}


def test_a_new_model_is_drawn_from_torchs_generator() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(new_model(SMALL | {"tie_word_embeddings": True}))
    assert models[0].training
    assert {parameter.dtype for parameter in models[0].parameters()} == {torch.float32}
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    config = models[0].config
    assert (config.model_type, config.num_hidden_layers, config.tie_word_embeddings) == ("llama", 2, True)
    torch.manual_seed(6)
    weight = new_model(SMALL).get_output_embeddings().weight
    assert not torch.equal(weight, models[0].get_output_embeddings().weight)


# --- what cannot be loaded ---------------------------------------------------------------------------------


def test_a_place_that_is_no_checkpoint(saved: Path, tmp_path: Path) -> None:
    for load in (load_model, load_tokenizer):
        for name in ("/no/where", "./no", "gpt2", "runs/a/export", "~/model"):
            text = message(lambda load=load, name=name: load(name))  # type: ignore[misc]
            assert text.startswith(f"model '{name}': no such directory")
        assert "is a file" in message(lambda load=load: load(str(saved / "config.json")))  # type: ignore[misc]
        assert "'' is empty" in message(lambda load=load: load(""))  # type: ignore[misc]
        text = message(lambda load=load: load(str(tmp_path)))  # type: ignore[misc]
        assert text == f"model '{tmp_path}' is not a checkpoint: it has no config.json"
        text = message(lambda load=load: load(str(saved.parent)))  # type: ignore[misc]
        assert text.endswith(f"it has no config.json; did you mean '{saved}'?")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_name_without_the_hub(load: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    text = message(lambda: load("nobody/no-such-model"))
    assert text.startswith("model 'nobody/no-such-model': no such directory")
    assert "the hub could not be reached" in text


def test_a_name_that_no_hub_has() -> None:
    assert "'a b/c'" in message(lambda: load_model("a b/c"))


def test_a_checkpoint_without_tokenizer(saved: Path) -> None:
    assert "tokenizer.save_pretrained" in message(lambda: load_tokenizer(str(saved)))


def test_a_damaged_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    assert "has no tokenizer that can be loaded" in message(lambda: load_tokenizer(str(checkpoint)))


@pytest.mark.parametrize("content", [b"hello world", b"", None])
def test_damaged_or_absent_weights(checkpoint: Path, content: bytes | None) -> None:
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    if content is None:
        weights.unlink()
        assert "no file named model.safetensors" in message(lambda: load_model(str(checkpoint)))
    else:
        for damaged in (content, whole[: len(whole) // 2]):
            weights.write_bytes(damaged)
            text = message(lambda: load_model(str(checkpoint)))
            assert text.startswith(f"model '{checkpoint}' cannot be loaded (")


def changed_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    return message(lambda: load_model(str(checkpoint)))


def test_weights_that_would_be_random_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    key = "model.layers.1.mlp.up_proj.weight"
    text = changed_weights(checkpoint, lambda weights: weights.pop(key))
    assert f"lacks: '{key}';" in text
    text = changed_weights(checkpoint, lambda weights: weights.pop("model.norm.weight"))
    assert f"lacks: '{key}' and 1 more" in text
    assert caplog.text == ""  # the one line is all there is


def test_weights_of_another_model_are_refused(checkpoint: Path) -> None:
    text = changed_weights(checkpoint, lambda weights: weights.update(extra=torch.zeros(1)))
    assert "no place for: 'extra'" in text


def test_weights_of_another_depth_are_refused(checkpoint: Path) -> None:
    """A checkpoint whose configuration says fewer layers would run, and be another model."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "'model.layers.3." in message(lambda: load_model(str(checkpoint)))


def test_weights_of_other_shapes_are_refused(checkpoint: Path) -> None:
    key = "model.layers.0.mlp.up_proj.weight"
    text = changed_weights(checkpoint, lambda weights: weights.update({key: torch.zeros(3, 32)}))
    assert f"'{key}' has shape [3, 32] in the checkpoint and [48, 32] by config.json" in text


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model_type": "no_model"}, "no_model"),
        ({"model_type": "clip"}, "CLIPConfig"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": 33}, "hidden size (33)"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
    ],
)
def test_a_configuration_that_makes_no_model(checkpoint: Path, change: dict[str, Any], part: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    (checkpoint / "config.json").write_text(json.dumps(config))
    text = message(lambda: load_model(str(checkpoint)))
    assert text.startswith(f"model '{checkpoint}' cannot be loaded")
    assert part in text


def test_a_configuration_that_is_not_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{nope")
    assert "not a valid JSON file" in message(lambda: load_model(str(checkpoint)))


def test_an_attention_implementation_or_a_device_that_is_not_there(saved: Path) -> None:
    assert "magic" in message(lambda: load_model(str(saved), attn_implementation="magic"))
    assert "magic" in message(lambda: new_model(SMALL, attn_implementation="magic"))
    text = message(lambda: load_model(str(saved), device_map="cuda:77"))
    assert text.startswith(f"model '{saved}' cannot be loaded (")
    assert "CUDA" in text


def test_transformers_may_speak_again_after_an_error(checkpoint: Path) -> None:
    before = transformers_logging.get_verbosity()
    changed_weights(checkpoint, lambda weights: weights.update(extra=torch.zeros(1)))
    assert transformers_logging.get_verbosity() == before


# --- what no new model can be made of ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"model_type": "lama"},
            "model.config.model_type: 'lama' is no model type of transformers; try 'llama'",
        ),
        (
            {"model_type": "xyz"},
            "model.config.model_type: 'xyz' is no model type of transformers; try 'llama'",
        ),
        ({"model_type": 3}, "model.config.model_type: '3' is no model type"),
        (
            {"hiden_size": 3},
            "model.config.hiden_size: unknown key (value 3) for model type 'llama'; did you mean",
        ),
        (
            {"rope_theta": 1e4},
            "model.config.rope_theta: unknown key (value 10000.0) for model type 'llama'; did",
        ),
        ({"zzzz": 1}, "model.config.zzzz: unknown key (value 1) for model type 'llama'"),
        ({"model_type": "clip"}, "model.config.hidden_size: unknown key"),
    ],
)
def test_unknown_types_and_keys(change: dict[str, Any], expected: str) -> None:
    assert message(lambda: new_model(SMALL | change)).startswith(expected)


def test_the_nearest_key_is_named() -> None:
    assert message(lambda: new_model(SMALL | {"hiden_size": 3})).endswith("did you mean 'hidden_size'?")
    assert message(lambda: new_model(SMALL | {"rope_theta": 1})).endswith("did you mean 'rope_parameters'?")


def test_other_names_of_a_key_are_known() -> None:
    """transformers lets some types be written with another type's keys."""
    config = {"model_type": "gpt2", "hidden_size": 16, "n_head": 2, "num_hidden_layers": 1, "vocab_size": 9}
    assert new_model(config).config.n_embd == 16


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"hidden_size": 17}, "hidden size (17)"),
        ({"hidden_size": 0}, ""),
        ({"hidden_size": -16}, ""),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "x"}, "num_hidden_layers"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "(4) must match"),  # found by running it
        ({"vocab_size": 0, "pad_token_id": None}, ""),
        ({"head_dim": 7}, "7"),
        ({"hidden_act": "nope"}, "KeyError 'nope'"),
    ],
)
def test_impossible_sizes(change: dict[str, Any], part: str) -> None:
    text = message(lambda: new_model(SMALL | change))
    assert text.startswith("model.config: no 'llama' model can be made of it: ")
    assert part in text


def test_one_line() -> None:
    assert one_line(ValueError("  first\n\n  second ")) == "first second"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(KeyError("name")) == "KeyError 'name'"
    assert len(one_line(ValueError("x" * 1000))) == 240
