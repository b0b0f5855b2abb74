from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from layerskip_model.errors import UserError
from tests.tiny_models import tiny_model
from train.data.tokenizer import train_tokenizer
from train.model import (
    build_model,
    check_fits,
    export_dtype,
    mixed_precision,
    outline_model,
    tokenizer_config,
)
from train.model_config import ModelConfig

SIZES = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
TRAIN = {"train": {"vocab_size": 262}}


def new(tokenizer: dict[str, Any] = TRAIN, **config: Any) -> ModelConfig:
    return ModelConfig.model_validate({"config": SIZES | HEADS | config, "tokenizer": tokenizer})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["some words, some more words\n"] * 20, 262)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=32).save_pretrained(
        path
    )
    tokenizer.save_pretrained(path)
    return str(path)


def existing(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name_or_path": name} | changes)


def test_a_new_model_gets_the_tokenizer_s_sizes(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model(new(), tokenizer, length=32, seed=0)
    config = model.config
    embedding: Any = model.get_input_embeddings()
    assert config.vocab_size == len(tokenizer) == embedding.weight.shape[0]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 1)
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert build_model(new(vocab_size=300), tokenizer, 32, 0).config.vocab_size == 300


def test_the_seed_decides_the_weights_and_nothing_else_does(tokenizer: PreTrainedTokenizerFast) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # the generator stands elsewhere on every rank
        return build_model(new(), tokenizer, 32, seed).get_output_embeddings().weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_an_existing_model_is_loaded_in_its_own_sizes(
    checkpoint: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_model(existing(checkpoint), tokenizer, 32, 0)
    expected = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=32)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert model.training
    assert build_model(existing(checkpoint, dtype="bfloat16"), tokenizer, 32, 0).dtype == torch.bfloat16
    eager = build_model(existing(checkpoint, attn_implementation="eager"), tokenizer, 32, 0)
    assert eager.config._attn_implementation == "eager"


def test_activation_checkpointing_changes_no_gradient(
    checkpoint: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    gradients = []
    for on in (False, True):
        model = build_model(existing(checkpoint, activation_checkpointing=on), tokenizer, 32, 0)
        assert model.is_gradient_checkpointing == on
        tokens = torch.arange(10).view(1, 10)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_where_the_tokenizer_comes_from() -> None:
    assert tokenizer_config(existing("here")).name_or_path == "here"
    assert tokenizer_config(existing("here", tokenizer={"name_or_path": "there"})).name_or_path == "there"
    assert tokenizer_config(new()).train is not None


def test_outlines_have_sizes_and_no_weights(checkpoint: str) -> None:
    for config, layers in ((new(), 2), (existing(checkpoint), 4)):
        model = outline_model(config)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert model.config.num_hidden_layers == layers
    large = new(hidden_size=8192, num_attention_heads=64, num_key_value_heads=64, num_hidden_layers=40)
    assert sum(p.numel() for p in outline_model(large).parameters()) > 10**9


@pytest.mark.parametrize("kind", ["phi3", "gemma2", "qwen3"])
def test_special_tokens_of_the_type_s_defaults_do_not_matter(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    head_dim: dict[str, Any] = {} if kind == "phi3" else {"head_dim": 8}
    config = new(model_type=kind, vocab_size=262, **head_dim)
    check_fits(config, outline_model(config), 262, 32)
    build_model(config, tokenizer, 32, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model_type": "lama"},
            "model.config.model_type: 'lama' is no model type of transformers; did you mean 'llama'?",
        ),
        (
            {"hiden_size": 3},
            "model.config.hiden_size: unknown key (value 3) for model_type 'llama'; did you mean 'hidden_size'?",
        ),
        ({"num_attention_heads": 3}, "model.config: "),
        ({"hidden_size": "16"}, "model.config: "),
        ({"hidden_size": -16}, "model"),
        ({"hidden_act": "nothing"}, "model"),
    ],
)  # fmt: skip
def test_impossible_configurations_are_one_line(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        outline_model(new(**changes))
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_checkpoints_that_are_none(tmp_path: Path, checkpoint: str) -> None:
    with pytest.raises(
        UserError, match=r"^model\.name_or_path: '.*' is no checkpoint: there is no config\.json"
    ):
        outline_model(existing(str(tmp_path)))
    with pytest.raises(UserError, match="is not there; name a checkpoint's directory"):
        outline_model(existing(str(tmp_path / "missing")))
    with pytest.raises(UserError, match="is no checkpoint"):
        outline_model(existing(str(Path(checkpoint) / "config.json")))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError) as caught:
        outline_model(existing(str(tmp_path)))
    assert str(caught.value).startswith(f"model.name_or_path: '{tmp_path}' cannot be loaded (")
    assert "\n" not in str(caught.value)


def test_length_and_vocabulary_must_fit(checkpoint: str, tokenizer: PreTrainedTokenizerFast) -> None:
    size = len(tokenizer)
    for config in (new(vocab_size=size), existing(checkpoint)):
        for model in (outline_model(config), build_model(config, tokenizer, 32, 0)):
            check_fits(config, model, size, 32)
            with pytest.raises(UserError, match=r"^batch\.length: 33 is more than the model's context of 32"):
                check_fits(config, model, size, 33)
            with pytest.raises(
                UserError, match=rf"^model\.config\.vocab_size: {size} is less than .* {size + 1} "
            ):
                check_fits(config, model, size + 1, 32)
    check_fits(new(), outline_model(new()), 10**6, 32)  # it will become the tokenizer's
    with pytest.raises(UserError, match=r"^batch\.length: 33 "):
        build_model(existing(checkpoint), tokenizer, 33, 0)


@pytest.mark.parametrize(("autocast", "expected"), [("bfloat16", "bf16"), ("float32", "no")])
def test_autocast_as_told(autocast: str, expected: str) -> None:
    assert (
        mixed_precision(ModelConfig.model_validate({"name_or_path": "x", "autocast": autocast})) == expected
    )


@pytest.mark.parametrize(
    ("gpu", "native", "avx", "expected"),
    [
        (True, True, False, "bf16"),
        (True, False, True, "no"),
        (False, False, True, "bf16"),
        (False, False, False, "no"),
    ],
)
def test_autocast_by_the_hardware(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, native: bool, avx: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert mixed_precision(existing("x")) == expected


LORA = {"rank": 2, "targets": ["q_proj", "down_proj"]}


def test_adapters_are_the_same_on_every_rank(checkpoint: str, tokenizer: PreTrainedTokenizerFast) -> None:
    def adapters(seed: int, rank: int = 0) -> dict[str, torch.Tensor]:
        torch.rand(rank + 1)
        model = build_model(existing(checkpoint, lora=LORA, dtype="bfloat16"), tokenizer, 32, seed)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    first, second, other = adapters(0), adapters(0, rank=5), adapters(1)
    assert len(first) == 2 * 2 * 4
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


def test_outlines_have_the_adapters_and_dtype_of_the_model(
    checkpoint: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = existing(checkpoint, lora=LORA, dtype="bfloat16")
    outline, model = outline_model(config), build_model(config, tokenizer, 32, 0)
    described = [
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in each.named_parameters()}
        for each in (outline, model)
    ]
    assert described[0] == described[1]
    with pytest.raises(UserError, match=r"^model\.lora\.targets: 'wq' is no linear map"):
        outline_model(existing(checkpoint, lora={"targets": ["wq"]}))


def test_the_dtype_of_an_export(checkpoint: str, tmp_path: Path) -> None:
    assert export_dtype(new()) == export_dtype(existing(checkpoint)) == torch.float32
    assert export_dtype(existing(checkpoint, export_dtype="bfloat16")) == torch.bfloat16
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert export_dtype(existing(str(tmp_path), dtype="float32")) == torch.bfloat16
    assert export_dtype(existing(str(tmp_path), export_dtype="float16")) == torch.float16
