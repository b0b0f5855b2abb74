"""EAGLE heads on disk: an exact round trip for every kind of target, the layout of their authors, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.errors import UserError
from layerskip_model.formats.eagle import eagle_kind, load_eagle, write_eagle
from layerskip_model.formats.fingerprint import fingerprint
from layerskip_model.formats.huggingface import load_config, outline
from layerskip_model.rope import Rope, rope_of
from tests.layerskip_model.tiny_eagle import READS, Head, half_of, some_head
from tests.tiny_models import CONFIGS, tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
Config = dict[str, Any]
Tensors = dict[str, Tensor]


def saved(directory: Path, kind: str = "llama", **changes: Any) -> PreTrainedModel:
    """A model that was loaded from files of its own."""
    tiny_model(kind, dtype=torch.float32, **changes).save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return saved(tmp_path_factory.mktemp("base"))


def write(directory: Path, model: PreTrainedModel, head: Head, dtype: torch.dtype = torch.float32) -> Path:
    directory.mkdir(parents=True)
    write_eagle(
        directory,
        head,
        head.state_dict(),
        dtype=dtype,
        backbone=Backbone(model),
        base=str(model.name_or_path),
        base_fingerprint=fingerprint(Path(str(model.name_or_path))),
    )
    return directory


def told(directory: Path) -> Config:
    return json.loads((directory / "config.json").read_text())


def changed(directory: Path, change: Callable[[Config, Tensors], Any]) -> None:
    """Rewrite a head's files."""
    path = directory / "model.safetensors"
    config, tensors = told(directory), load_file(path)
    change(config, tensors)
    save_file(tensors, path)
    (directory / "config.json").write_text(json.dumps(config))


def refused(directory: Path, model: PreTrainedModel) -> str:
    """The one line that is said of a head."""
    with pytest.raises(UserError) as caught:
        load_eagle(directory, Backbone(model))
    text = str(caught.value)
    assert text.startswith(f"heads '{directory}'")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("kind", "reduced"), [("eagle", False), ("eagle3", False), ("eagle3", True)])
@pytest.mark.parametrize("target", CONFIGS)
def test_what_is_written_is_read_again(target: str, kind: str, reduced: bool, tmp_path: Path) -> None:
    model = saved(tmp_path / "base", target)
    head = some_head(kind, model, reduced=reduced).float()
    directory = write(tmp_path / "head", model, head)
    again = load_eagle(directory, Backbone(model))
    assert eagle_kind(directory) == kind
    ours, theirs = head.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    embedded, states = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    outputs = [one.logits(one.layer(one.inputs(embedded, states))) for one in (head, again)]
    assert torch.equal(*outputs)
    assert told(directory)["num_hidden_layers"] == 1
    if kind == "eagle3":
        assert again.reads == READS
    # Rounded once, it does not change any more; and a model without weights will do.
    rounded = load_eagle(write(tmp_path / "rounded", model, head, torch.bfloat16), Backbone(model))
    write(tmp_path / "twice", model, rounded, torch.bfloat16)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("rounded", "twice")]
    assert files[0] == files[1]
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}
    name = str(model.name_or_path)
    assert load_eagle(directory, outline(name, load_config(name))).state_dict().keys() == ours.keys()


def test_the_layout_is_that_of_the_authors(base: PreTrainedModel, tmp_path: Path) -> None:
    maps = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    maps |= {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")} | {
        "post_attention_layernorm.weight"
    }
    directory = write(tmp_path / "eagle", base, some_head("eagle", base))
    assert load_file(directory / "model.safetensors").keys() == {"fc.weight", "fc.bias"} | {
        f"layers.0.{name}" for name in maps
    }
    assert told(directory)["architectures"] == ["LlamaForCausalLMEagle"]  # as SGLang has it, with the bias
    assert "bias" not in told(directory)
    directory = write(tmp_path / "eagle3", base, some_head("eagle3", base, reduced=True))
    tensors = load_file(directory / "model.safetensors")
    norms = {"hidden_norm.weight", "input_layernorm.weight"}
    assert tensors.keys() == {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"} | {
        f"midlayer.{name}" for name in maps | norms
    }
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    config = told(directory)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["draft_vocab_size"], config["vocab_size"]) == (half_of().size, 64)
    assert config["eagle_config"] == {
        "use_aux_hidden_state": True,
        "eagle_aux_hidden_state_layer_ids": list(READS),
    }
    whole = write(tmp_path / "whole", base, some_head("eagle3", base))
    assert not {"d2t", "t2d"} & load_file(whole / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("llama", {"rope_parameters": LLAMA3}),
        ("gemma3", {}),
        ("qwen3", {"layer_types": ["full_attention"] * 4}),
    ],
)
def test_transformers_reads_the_target_out_of_config_json(
    target: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = saved(tmp_path / "base", target, **changes)
    directory = write(tmp_path / "head", model, some_head("eagle3", model))
    load_eagle(directory, Backbone(model))
    config, theirs = AutoConfig.from_pretrained(directory), model.config
    assert config.num_hidden_layers == 1
    assert config.rope_parameters == theirs.rope_parameters
    assert (getattr(config, "layer_types", None) or [])[:1] == (getattr(theirs, "layer_types", None) or [])[
        :1
    ]


def _set(**values: Any) -> Callable[[Config, Tensors], Any]:
    return lambda config, tensors: config.update(values)


def _tensor(name: str, make: Callable[[Tensors], Tensor | None]) -> Callable[[Config, Tensors], Any]:
    def change(config: Config, tensors: Tensors) -> None:
        made = make(tensors)
        tensors.pop(name, None)
        if made is not None:
            tensors[name] = made.contiguous()

    return change


BOTH: list[tuple[Callable[[Config, Tensors], Any], str]] = [
    (_set(vocab_size=65), "of another model: vocab_size is 65 in config.json, and 64 in this one"),
    (_set(num_attention_heads=8), "num_attention_heads is 8 in config.json, and 4 in this one"),
    (_set(num_hidden_layers=2), "num_hidden_layers is 2 in config.json"),
    (_tensor("fc.weight", lambda t: t["fc.weight"][:, 1:]), "fc.weight is [32, "),
    (_tensor("extra.weight", lambda t: torch.zeros(2)), "has beside them 'extra.weight'"),
    (_set(base_fingerprint="0"), "with other weights than"),
    (
        _set(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "RoPE of base 10000, rope_type dynamic, factor 2.0 in config.json can be computed here where it is",
    ),
    (
        _set(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor 0.5 in config.json can be computed here where it is the model's, and that is base 10000",
    ),
    (_set(rope_parameters={"rope_type": "linear"}), "in config.json has no tables (KeyError: 'factor')"),
    (
        _set(rope_parameters={"rope_type": "round"}),
        "rope_type round in config.json has no tables (KeyError: 'round')",
    ),
    (
        _set(rope_parameters={"rope_theta": "much"}, rope_theta="much"),
        "RoPE of base 'much', rope_type default in config.json has no tables",
    ),
    (
        _set(rope_parameters={"rope_theta": -1.0}, rope_theta=-1.0),
        "RoPE of base -1, rope_type default in config.json has no tables",
    ),
    (
        _set(rope_theta=1e6),
        "config.json names two RoPE bases, 10000.0 in rope_parameters or rope_scaling and 1000000.0",
    ),
]


@pytest.mark.parametrize(("change", "expected"), BOTH)
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_head_that_does_not_fit(
    kind: str, change: Callable[[Config, Tensors], Any], expected: str, base: PreTrainedModel, tmp_path: Path
) -> None:
    directory = write(tmp_path / "head", base, some_head(kind, base, reduced=True))
    changed(directory, change)
    assert expected in refused(directory, base)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            _set(feature_layers=[1, 2, 9]),
            "this model of 4 layers: feature_layers is [1, 2, 9] in config.json",
        ),
        (_set(feature_layers=[2, 2, 3]), "feature_layers is [2, 2, 3]"),
        (_set(feature_layers=[1, 2]), "feature_layers is [1, 2]"),
        (_set(feature_layers="1,2,3"), "feature_layers is 1,2,3"),
        (_set(feature_layers=None, eagle_config=None), "of 4 layers: no layers are named in config.json"),
        (_set(draft_vocab_size=39), "draft_vocab_size is 39 in config.json, and d2t has 38 tokens"),
        (_set(norm_before_fc=True), "norm_before_fc is true in config.json"),
        (_set(eagle_config={"use_aux_hidden_state": False}), "use_aux_hidden_state is false"),
        (_tensor("norm.weight", lambda t: None), "lacks 'norm.weight'"),
        (_tensor("d2t", lambda t: None), "there is no d2t"),
        (_tensor("d2t", lambda t: t["d2t"] + 30), "d2t does not name different tokens, in order"),
        (_tensor("d2t", lambda t: t["d2t"].flip(0)), "d2t does not name different tokens"),
        (_tensor("t2d", lambda t: ~t["t2d"]), "d2t and t2d contradict each other"),
        (_tensor("t2d", lambda t: t["t2d"][:-1]), "t2d (63) is of another vocabulary (64)"),
        (
            _tensor("lm_head.weight", lambda t: t["lm_head.weight"][1:]),
            "lm_head.weight has 37 rows, for 38 tokens",
        ),
    ],
)
def test_an_eagle3_head_that_contradicts_itself_or_its_model(
    change: Callable[[Config, Tensors], Any], expected: str, base: PreTrainedModel, tmp_path: Path
) -> None:
    directory = write(tmp_path / "head", base, some_head("eagle3", base, reduced=True))
    changed(directory, change)
    assert expected in refused(directory, base)


OWN_ROPE = {"rope_theta": 77.0, "rope_type": "default"}


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("target", CONFIGS)
def test_rope_of_its_own_is_kept(target: str, kind: str, tmp_path: Path) -> None:
    """In all words that config.json has for it, whatever those of the target are."""
    model = saved(tmp_path / "base", target)
    head = some_head(kind, model)
    assert load_eagle(write(tmp_path / "targets", model, head), Backbone(model)).layer.rope is None
    head.layer.rope = Rope(Backbone(model), OWN_ROPE)
    directory = write(tmp_path / "head", model, head.float())
    again = load_eagle(directory, Backbone(model))
    assert again.layer.rope is not None
    assert again.layer.rope.parameters == OWN_ROPE
    assert rope_of(AutoConfig.from_pretrained(directory).to_dict(), again.layer.kind) == OWN_ROPE
    if target != "gemma3":  # which has one of each kind of attention, and no words for that but the newest
        assert (told(directory)["rope_theta"], told(directory)["rope_scaling"]) == (77.0, None)
    entering = torch.randn(2, 9, head.layer.width)
    assert torch.equal(again.layer(entering), head.layer(entering))
    write(tmp_path / "twice", model, again)
    files = [(tmp_path / name / "config.json").read_bytes() for name in ("head", "twice")]
    assert files[0] == files[1]


def test_a_head_turns_as_its_own_configuration_says(tmp_path: Path) -> None:
    """For a target with scaled RoPE: with other scaling, with none, and without a word, which is LlamaConfig's."""
    model = saved(tmp_path / "base", rope_parameters=LLAMA3)
    directory = write(tmp_path / "head", model, some_head("eagle", model))
    assert load_eagle(directory, Backbone(model)).layer.rope is None
    other: Config = LLAMA3 | {"factor": 4.0}
    for words, expected in (
        ({"rope_parameters": other}, other),
        ({"rope_theta": 500000.0}, {"rope_theta": 500000.0, "rope_type": "default"}),
        ({}, {"rope_theta": 10000.0, "rope_type": "default"}),
    ):
        changed(directory, lambda config, tensors: [config.pop(key) for key in [*config] if "rope" in key])
        changed(directory, _set(**words))
        rope = load_eagle(directory, Backbone(model)).layer.rope
        assert rope is not None
        assert rope.parameters == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_on_the_normed_state_is_kept(
    dtype: torch.dtype, base: PreTrainedModel, tmp_path: Path
) -> None:
    head = some_head("eagle3", base, norm_before_residual=True).float()
    directory = write(tmp_path / "head", base, head, dtype)
    assert told(directory)["norm_before_residual"] is True
    again = load_eagle(directory, Backbone(base))
    assert isinstance(again, Eagle3Head)
    assert again.norm_before_residual
    write(tmp_path / "twice", base, again, dtype)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (directory / name).read_bytes()
    plain = load_eagle(write(tmp_path / "plain", base, some_head("eagle3", base)), Backbone(base))
    assert isinstance(plain, Eagle3Head)
    assert not plain.norm_before_residual


def test_files_that_are_missing_or_damaged(base: PreTrainedModel, tmp_path: Path) -> None:
    directory = write(tmp_path / "head", base, some_head("eagle", base))
    weights, config = directory / "model.safetensors", directory / "config.json"
    whole, words = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:1000])
    assert "model.safetensors is cut short or damaged" in refused(directory, base)
    weights.unlink()
    assert "there is no model.safetensors or pytorch_model.bin in it" in refused(directory, base)
    torch.save({"fc.weight": {1, 2}}, directory / "pytorch_model.bin")
    assert "pytorch_model.bin is no plain state_dict" in refused(directory, base)
    config.write_text(words[:20])
    assert "config.json is damaged" in refused(directory, base)
    (directory / "config.json").write_text("[1, 2]")
    assert "config.json is damaged (no object)" in refused(directory, base)
    config.unlink()
    assert "no config.json in it" in refused(directory, base)
    assert eagle_kind(directory) is None
