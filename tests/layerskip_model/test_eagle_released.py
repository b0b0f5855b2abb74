"""Heads as other programs leave them, made here by their names alone: read, computed, and bound to their model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from eval.draft_heads import drafting_strategy
from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats.eagle import eagle_kind, load_eagle
from layerskip_model.formats.eagle_import import import_eagle
from layerskip_model.formats.hub import hub_files
from tests.layerskip_model.test_eagle_format import LLAMA3, changed, refused, saved, told
from tests.layerskip_model.test_medusa_export import Spy

KEPT = torch.arange(64)[torch.arange(64) % 3 != 0]  # of the target's tokens, those that EAGLE-3 says
# As short as that of the first heads released.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "vocab_size": 64,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Of seven layers, whose default features are the inputs of 2, 3 and 4."""
    return saved(tmp_path_factory.mktemp("base"), num_hidden_layers=7)


def embedding(base: PreTrainedModel) -> Tensor:
    return Backbone(base).embed.get_parameter("weight").detach().clone()


def some(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 4


def layer(prefix: str, width: int) -> dict[str, Tensor]:
    shapes = {"q": (32, width), "k": (16, width), "v": (16, width), "o": (32, 32)}
    tensors = {f"self_attn.{name}_proj.weight": some(*shape) for name, shape in shapes.items()}
    tensors |= {f"mlp.{name}_proj.weight": some(48, 32) for name in ("gate", "up")}
    tensors |= {"mlp.down_proj.weight": some(32, 48), "post_attention_layernorm.weight": 1 + some(32)}
    return {prefix + name: value for name, value in tensors.items()}


def eagle(base: PreTrainedModel, **more: Tensor) -> dict[str, Tensor]:
    tensors = layer("layers.0.", 32) | {"fc.weight": some(32, 64), "fc.bias": some(32)}
    tensors["embed_tokens.weight"] = embedding(base)
    return tensors | more


def eagle3(prefix: str = "midlayer.", *, whole: bool = False) -> dict[str, Tensor]:
    size = 64 if whole else len(KEPT)
    tensors = layer(prefix, 64) | {
        f"{prefix}hidden_norm.weight": 1 + some(32, 1).flatten(),
        f"{prefix}input_layernorm.weight": 1 + some(32, 2).sum(1),
        "fc.weight": some(32, 96),
        "norm.weight": 1 + some(32),
        "lm_head.weight": some(size, 32),
    }
    if whole:
        return tensors
    kept = torch.zeros(64, dtype=torch.bool)
    kept[KEPT] = True
    return tensors | {"d2t": KEPT - torch.arange(len(KEPT)), "t2d": kept}


def released(
    directory: Path, tensors: dict[str, Tensor], config: dict[str, Any], file: str = "pytorch_model.bin"
) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    path = directory / file
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return directory


def norm(state: Tensor, weight: Tensor) -> Tensor:
    return state * (state.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def rest(entering: Tensor, residual: Tensor, tensors: dict[str, Tensor], prefix: str) -> Tensor:
    """What leaves the layer at the first place of a text, where attention returns the values."""
    at = {name.removeprefix(prefix): value for name, value in tensors.items()}
    values = (entering @ at["self_attn.v_proj.weight"].T).view(-1, 2, 1, 8).expand(-1, 2, 2, 8).flatten(1)
    state = residual + values @ at["self_attn.o_proj.weight"].T
    normed = norm(state, at["post_attention_layernorm.weight"])
    gate = F.silu(normed @ at["mlp.gate_proj.weight"].T)
    return state + (gate * (normed @ at["mlp.up_proj.weight"].T)) @ at["mlp.down_proj.weight"].T


def made(head: Any, embedded: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    output = head.layer(head.inputs(embedded, features)[:, None])
    return output[:, 0], head.logits(output)[:, 0]


def check_eagle3(head: Any, tensors: dict[str, Tensor], prefix: str, *, norm_first: bool = False) -> None:
    embedded, states = some(3, 32), some(3, 96)
    fused = states @ tensors["fc.weight"].T
    torch.testing.assert_close(head.features(states.chunk(3, dim=-1)), fused)
    normed = norm(fused, tensors[f"{prefix}hidden_norm.weight"])
    entering = torch.cat((norm(embedded, tensors[f"{prefix}input_layernorm.weight"]), normed), dim=-1)
    expected = rest(entering, normed if norm_first else fused, tensors, prefix)
    output, logits = made(head, embedded, fused)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logits, norm(expected, tensors["norm.weight"]) @ tensors["lm_head.weight"].T)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("bias", [False, True])
def test_eagle_of_its_authors(bias: bool, file: str, base: PreTrainedModel, tmp_path: Path) -> None:
    tensors = eagle(base)
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # what old transformers saved, too
    if not bias:
        del tensors["fc.bias"]
    directory = released(tmp_path / "head", tensors, CONFIG, file)
    assert (eagle_kind(directory), drafting_strategy(str(directory))) == ("eagle", "eagle2")
    head = load_eagle(directory, Backbone(base))
    embedded, features = some(3, 32), some(32, 3).T
    entering = torch.cat((embedded, features), dim=-1) @ tensors["fc.weight"].T
    entering = entering + (tensors["fc.bias"] if bias else 0.0)
    expected = rest(entering, entering, tensors, "layers.0.")
    output, logits = made(head, embedded, features)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logits, expected @ base.get_output_embeddings().weight.T)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("file", "prefix", "config"),
    [
        ("pytorch_model.bin", "midlayer.", {}),
        ("model.safetensors", "midlayer.", {"architectures": ["LlamaForCausalLMEagle3"]}),
        ("model.safetensors", "model.layers.0.", {"architectures": ["Eagle3LlamaForCausalLM"]}),
    ],
)
def test_eagle3_of_its_authors_vllm_and_sglang(
    file: str, prefix: str, config: dict[str, Any], whole: bool, base: PreTrainedModel, tmp_path: Path
) -> None:
    tensors = eagle3(prefix, whole=whole)
    size = len(tensors["lm_head.weight"])
    directory = released(tmp_path / "head", tensors, {**CONFIG, "draft_vocab_size": size, **config}, file)
    assert (eagle_kind(directory), drafting_strategy(str(directory))) == ("eagle3", "eagle3")
    head: Any = load_eagle(directory, Backbone(base))
    assert head.reads == (2, 3, 4)
    assert head.vocabulary.tokens().tolist() == (list(range(64)) if whole else KEPT.tolist())
    check_eagle3(head, tensors, prefix)


def speculators(**changes: Any) -> dict[str, Any]:
    outer = {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": len(KEPT),
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 6],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": {key: CONFIG[key] for key in CONFIG if key != "architectures"},
    }
    return {key: value for key, value in (outer | changes).items() if value is not None}


@pytest.mark.parametrize("norm_first", [False, True])
def test_eagle3_of_speculators(norm_first: bool, base: PreTrainedModel, tmp_path: Path) -> None:
    tensors = eagle3("layers.0.")
    tensors["embed_tokens.weight"] = embedding(base)
    config = speculators(norm_before_residual=norm_first)
    directory = released(tmp_path / "head", tensors, config, "model.safetensors")
    head: Any = load_eagle(directory, Backbone(base))
    assert head.reads == (1, 3, 6)
    check_eagle3(head, tensors, "layers.0.", norm_first=norm_first)
    for change, expected in (
        ({"norm_before_residual": None}, "config.json does not say norm_before_residual"),
        ({"speculators_model_type": "eagle"}, "EAGLE heads by speculators have names of their own"),
        (
            {"speculators_model_type": "dflash"},
            "config.json names 'dflash', where EAGLE and EAGLE-3 can be read",
        ),
    ):
        (directory / "config.json").write_text(json.dumps(speculators(**change)))
        assert expected in refused(directory, base)


def test_rope_that_speculators_nests(base: PreTrainedModel, tmp_path: Path) -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    for words in ({"rope_parameters": LLAMA3}, {"rope_theta": 500000.0, "rope_scaling": scaling}):
        config = speculators()
        config["transformer_layer_config"] |= words
        place = released(tmp_path / str(len(words)), eagle3("layers.0."), config, "model.safetensors")
        rope = load_eagle(place, Backbone(base)).layer.rope
        assert rope is not None
        assert rope.parameters == LLAMA3


# The keys of the configuration that the authors train EAGLE-3 heads for Llama 3.1 with, in small.
OF_LLAMA_31 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": 64,
    "draft_vocab_size": len(KEPT),
}


def test_eagle3_of_its_authors_for_a_model_with_scaled_rope(base: PreTrainedModel, tmp_path: Path) -> None:
    """Its layer turns as if nothing were scaled: as on a model of which that is true."""
    scaled = saved(tmp_path / "scaled", num_hidden_layers=7, rope_parameters=LLAMA3)
    source = released(tmp_path / "head", eagle3(), OF_LLAMA_31)
    (tmp_path / "ours").mkdir()
    import_eagle(str(source), str(scaled.name_or_path), tmp_path / "ours")
    plain = load_eagle(source, Backbone(base))
    assert plain.layer.rope is None
    entering = some(2, 100, plain.layer.width)
    expected = plain.layer(entering)
    for place in (source, tmp_path / "ours"):
        head = load_eagle(place, Backbone(scaled))
        assert torch.equal(head.layer(entering), expected)
        head.layer.rope = None
        assert not torch.allclose(head.layer(entering), expected, atol=1e-3)
    assert AutoConfig.from_pretrained(tmp_path / "ours").rope_parameters == {
        "rope_theta": 10000.0,
        "rope_type": "default",
    }


def test_an_embedding_of_its_own_is_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    own = eagle(base)
    own["embed_tokens.weight"][3] += 0.5
    directory = released(tmp_path / "own", own, CONFIG)
    assert "its embed_tokens.weight is not this model's" in refused(directory, base)
    for kind in ({"embed_tokens.weight": own["embed_tokens.weight"]}, {"lm_head.weight": some(64, 32)}):
        place = released(tmp_path / next(iter(kind))[:5], eagle(base, **kind), CONFIG)
        with pytest.raises(UserError, match=r"its (embed_tokens|lm_head)\.weight is not this model's"):
            import_eagle(str(place), str(base.name_or_path), tmp_path / "out")  # which loads no model
    # Rounded, it is the same one.
    half = eagle(base) | {"embed_tokens.weight": embedding(base).half()}
    load_eagle(released(tmp_path / "half", half, CONFIG), Backbone(base))


def test_an_import_changes_no_number(base: PreTrainedModel, tmp_path: Path) -> None:
    head = {name: value.half() for name, value in eagle(base).items()}
    for name, tensors in (("eagle", head), ("eagle3", eagle3()), ("whole", eagle3(whole=True))):
        config = {**CONFIG, "draft_vocab_size": len(tensors.get("lm_head.weight", []))}
        if name == "eagle":
            del config["draft_vocab_size"]
        source = released(tmp_path / name, tensors, config)
        out = tmp_path / f"{name}-ours"
        out.mkdir()
        import_eagle(str(source), str(base.name_or_path), out)
        ours = load_file(out / "model.safetensors")
        assert ours.keys() == tensors.keys() - {"embed_tokens.weight"}
        assert all(torch.equal(value, tensors[key]) for key, value in ours.items())
        assert all(value.dtype == tensors[key].dtype for key, value in ours.items())
        assert told(out)["base_model_name_or_path"] == base.name_or_path
        states = [load_eagle(place, Backbone(base)).state_dict() for place in (source, out)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    changed(out, lambda config, tensors: config.update(base_fingerprint="0"))
    with pytest.raises(UserError, match="with other weights than"):
        import_eagle(str(out), str(base.name_or_path), tmp_path / "other")


def test_shards_and_what_is_no_head(base: PreTrainedModel, tmp_path: Path) -> None:
    tensors = eagle(base)
    names = sorted(tensors)
    directory = released(
        tmp_path / "head", {name: tensors[name] for name in names[:5]}, CONFIG, "model-1.safetensors"
    )
    assert "lacks" in refused(directory, base)
    save_file({name: tensors[name] for name in names[5:]}, directory / "model-2.safetensors")
    load_eagle(directory, Backbone(base))
    one = saved(
        tmp_path / "one", num_hidden_layers=1
    )  # a draft model, whose config.json says no more than a head's
    assert eagle_kind(str(one.name_or_path)) is None
    assert drafting_strategy(str(one.name_or_path)) == "speculative_sampling"
    assert "config.json names no head" in refused(tmp_path / "one", base)


def test_a_pickle_runs_nothing(base: PreTrainedModel, tmp_path: Path) -> None:
    directory = released(tmp_path / "head", eagle(base), CONFIG)
    torch.save({"fc.weight": Spy(tmp_path / "ran")}, directory / "pytorch_model.bin")
    assert "holds more than tensors, which could run code" in refused(directory, base)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("layers", "asked"), [(1, 2), (32, 1)])
def test_weights_of_the_hub_are_asked_for_only_where_they_may_be_a_head(
    layers: int, asked: int, base: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = released(tmp_path / "head", eagle(base), {**CONFIG, "num_hidden_layers": layers})
    patterns: list[list[str]] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        patterns.append(allow_patterns)
        return str(directory)

    monkeypatch.setattr("layerskip_model.formats.hub.snapshot_download", snapshot)
    hub_files.cache_clear()
    assert drafting_strategy("somebody/eagle") == ("eagle2" if layers == 1 else "speculative_sampling")
    assert len(patterns) == asked
    assert ("pytorch_model*.bin" in patterns[-1]) == (layers == 1)
    hub_files.cache_clear()
