"""EAGLE heads in the forms of other programs and back: the same numbers, and what cannot be said is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.errors import UserError
from layerskip_model.formats.__main__ import app
from layerskip_model.formats.eagle_export import FORMS, EagleWritten, export_eagle
from layerskip_model.formats.eagle_import import import_eagle
from layerskip_model.rope import Rope
from tests.layerskip_model.test_eagle_format import LLAMA3, changed, saved, told, write
from tests.layerskip_model.tiny_eagle import Head, some_head

DEFAULT = {"rope_theta": 10000.0, "rope_type": "default"}
FILES = ("model.safetensors", "config.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return saved(tmp_path_factory.mktemp("base"))


def export(source: Path, form: str, out: Path, **options: Any) -> EagleWritten:
    out.mkdir()
    return export_eagle(str(source), form, out, **options)


def tensors_in(directory: Path) -> dict[str, Tensor]:
    pickle = directory / "pytorch_model.bin"
    return torch.load(pickle, weights_only=True) if pickle.exists() else load_file(directory / FILES[0])


def without_bias(head: Head) -> Head:
    head.fc.register_parameter("bias", None)
    return head


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_eagle3_there_and_back_is_the_same_bytes(
    form: str, reduced: bool, base: PreTrainedModel, tmp_path: Path
) -> None:
    source = write(tmp_path / "head", base, some_head("eagle3", base, reduced=reduced), torch.bfloat16)
    written = export(source, form, tmp_path / "theirs")
    assert (written.kind, written.dtype, written.base) == ("eagle3", torch.bfloat16, base.name_or_path)
    (tmp_path / "again").mkdir()
    import_eagle(str(tmp_path / "theirs"), str(base.name_or_path), tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("form", ["eagle", "vllm", "sglang"])
@pytest.mark.parametrize("bias", [False, True])
def test_eagle_there_and_back_is_the_same_bytes(
    bias: bool, form: str, base: PreTrainedModel, tmp_path: Path
) -> None:
    head = some_head("eagle", base)
    source = write(tmp_path / "head", base, even(head) if bias else without_bias(head))
    written = export(source, form, tmp_path / "theirs")
    tensors = tensors_in(tmp_path / "theirs")
    assert ("fc.bias" in tensors) == {"vllm": False, "sglang": True, "eagle": bias}[form]
    assert bool(written.note) == ((form, bias) in (("vllm", True), ("sglang", False)))
    (tmp_path / "again").mkdir()
    if form == "vllm" and bias:
        with pytest.raises(UserError, match=r"its embed_tokens\.weight is not this model's"):
            import_eagle(str(tmp_path / "theirs"), str(base.name_or_path), tmp_path / "again")
        return
    import_eagle(str(tmp_path / "theirs"), str(base.name_or_path), tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("form", FORMS)
def test_rope_of_its_own_goes_there_and_back(form: str, kind: str, tmp_path: Path) -> None:
    """For a target with scaled RoPE; also of a head whose config.json has no word for it."""
    if kind == "eagle" and form == "speculators":
        return
    base = saved(tmp_path / "base", rope_parameters=LLAMA3)
    head = some_head(kind, base)
    head = without_bias(head) if kind == "eagle" else head
    head.layer.rope = Rope(Backbone(base), DEFAULT)
    source = write(tmp_path / "head", base, head)
    silent = write(tmp_path / "silent", base, head)
    changed(silent, lambda config, tensors: [config.pop(key) for key in [*config] if "rope" in key])
    for place in (source, silent):
        theirs, again = tmp_path / f"{place.name}-theirs", tmp_path / f"{place.name}-again"
        export(place, form, theirs)
        config = told(theirs)
        layer = config["transformer_layer_config"] if form == "speculators" else config
        assert (layer["rope_theta"], layer["rope_scaling"]) == (10000.0, None)
        (tmp_path / "read").mkdir(exist_ok=True)
        (tmp_path / "read" / "config.json").write_text(json.dumps(layer | {"model_type": "llama"}))
        assert AutoConfig.from_pretrained(tmp_path / "read").rope_parameters == DEFAULT
        again.mkdir()
        import_eagle(str(theirs), str(base.name_or_path), again)
        for name in FILES:
            assert (again / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_a_residual_on_the_normed_state_goes_where_it_can_be_said(
    form: str, base: PreTrainedModel, tmp_path: Path
) -> None:
    source = write(tmp_path / "head", base, some_head("eagle3", base, norm_before_residual=True))
    if form in ("eagle", "sglang"):
        with pytest.raises(UserError, match=r"norm_before_residual is true .* use --to vllm or speculators"):
            export(source, form, tmp_path / "theirs")
        return
    export(source, form, tmp_path / "theirs")
    assert told(tmp_path / "theirs")["norm_before_residual"] is True
    (tmp_path / "again").mkdir()
    import_eagle(str(tmp_path / "theirs"), str(base.name_or_path), tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()


def test_what_vllm_is_given(base: PreTrainedModel, tmp_path: Path) -> None:
    """By the names of its classes; it shares what is not in the file, and takes an index as ours."""
    head = some_head("eagle3", base, reduced=True)
    export(write(tmp_path / "three", base, head), "vllm", tmp_path / "vllm3")
    config, tensors = told(tmp_path / "vllm3"), tensors_in(tmp_path / "vllm3")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert (config["draft_vocab_size"], config["model_type"], config["tie_word_embeddings"]) == (
        38,
        "llama",
        False,
    )
    assert tensors["d2t"].dtype == torch.int64
    assert "embed_tokens.weight" not in tensors
    assert AutoConfig.from_pretrained(tmp_path / "vllm3").draft_vocab_size == 38
    whole = write(tmp_path / "whole", base, some_head("eagle3", base))
    for form in ("vllm", "speculators"):  # it has no parameter for d2t where the vocabulary is the target's
        export(whole, form, tmp_path / f"{form}-whole")
        assert "d2t" not in tensors_in(tmp_path / f"{form}-whole")
    plain = without_bias(some_head("eagle", base))
    export(write(tmp_path / "one", base, plain), "vllm", tmp_path / "vllm1", dtype="float16")
    assert told(tmp_path / "vllm1")["architectures"] == ["EagleLlamaForCausalLM"]
    tensors = tensors_in(tmp_path / "vllm1")
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert not {"embed_tokens.weight", "lm_head.weight", "layers.0.input_layernorm.weight"} & tensors.keys()


def even(head: Head) -> Head:
    """With an fc whose part for embeddings turns them and changes no length."""
    head.fc.weight.data[:, :32] = torch.linalg.qr(head.fc.weight.data[:, :32]).Q
    return head


def test_a_bias_goes_into_an_embedding_where_vllm_has_none(base: PreTrainedModel, tmp_path: Path) -> None:
    head = even(some_head("eagle", base))
    source = write(tmp_path / "head", base, head, torch.float64)
    export(source, "vllm", tmp_path / "vllm")
    tensors = tensors_in(tmp_path / "vllm")
    states = torch.randn(64, 32, dtype=torch.float64)
    embedded = base.get_input_embeddings()(torch.arange(64)).double()
    entering = torch.cat((tensors["embed_tokens.weight"], states), dim=-1) @ tensors["fc.weight"].T
    torch.testing.assert_close(entering, head.inputs(embedded, states))
    assert "bias" not in told(tmp_path / "vllm")  # by which its layer would have biases
    # What is exact in this dtype is not in 16 bits, in which it is served.
    changed(source, lambda config, all_: all_["fc.weight"][:, 0].mul_(1e-4).add_(all_["fc.weight"][:, 1]))
    with pytest.raises(
        UserError, match=r"in bfloat16 it makes fc's output off by \d+%; train with objective.bias"
    ):
        export(source, "vllm", tmp_path / "lost")


def test_what_sglang_and_the_others_are_given(base: PreTrainedModel, tmp_path: Path) -> None:
    head = some_head("eagle3", base, reduced=True)
    assert isinstance(head, Eagle3Head)
    source = write(tmp_path / "head", base, head)
    export(source, "sglang", tmp_path / "sglang")
    config = told(tmp_path / "sglang")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]  # it takes outputs
    export(
        write(tmp_path / "one", base, without_bias(some_head("eagle", base))), "sglang", tmp_path / "sglang1"
    )
    assert told(tmp_path / "sglang1")["architectures"] == ["LlamaForCausalLMEagle"]
    assert "bias" not in told(tmp_path / "sglang1")
    assert not tensors_in(tmp_path / "sglang1")["fc.bias"].any()
    export(source, "speculators", tmp_path / "speculators")
    config, tensors = told(tmp_path / "speculators"), tensors_in(tmp_path / "speculators")
    assert config["norm_before_residual"] is False
    assert "norm_before_residual" not in config["transformer_layer_config"]
    assert (config["speculators_model_type"], config["eagle_aux_hidden_state_layer_ids"]) == (
        "eagle3",
        [1, 2, 3],
    )
    assert config["transformer_layer_config"]["num_hidden_layers"] == 1
    assert config["speculators_config"]["verifier"]["name_or_path"] == base.name_or_path
    assert "layers.0.hidden_norm.weight" in tensors
    assert torch.equal(tensors["embed_tokens.weight"], base.get_input_embeddings()(torch.arange(64)))
    export(source, "eagle", tmp_path / "eagle")
    assert {"d2t", "t2d", "midlayer.hidden_norm.weight"} <= tensors_in(tmp_path / "eagle").keys()
    assert not (tmp_path / "eagle" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("target", "changes", "kind", "form", "expected"),
    [
        ("qwen3", {}, "eagle3", "vllm", "Eagle3Qwen3ForCausalLM"),
        ("mistral", {"sliding_window": None}, "eagle3", "vllm", "LlamaForCausalLMEagle3"),
        (
            "qwen3",
            {},
            "eagle",
            "vllm",
            "has EAGLE heads on a Llama's layer, and this is one of model type 'qwen3'",
        ),
        ("qwen3", {}, "eagle3", "sglang", "has EAGLE-3 heads on a Llama's layer"),
        (
            "gemma2",
            {},
            "eagle3",
            "vllm",
            "on a Llama's or Qwen3's layer, and this is one of model type 'gemma2'",
        ),
        ("mistral", {}, "eagle3", "vllm", "their layer sees a window of 5 tokens"),
        ("llama", {}, "eagle", "speculators", "--to speculators has EAGLE-3 only; use --to vllm"),
        ("llama", {"attention_bias": True}, "eagle3", "vllm", "on a Llama's or Qwen3's layer"),
    ],
)
def test_layers_that_a_program_has_and_has_not(
    target: str, changes: dict[str, Any], kind: str, form: str, expected: str, tmp_path: Path
) -> None:
    model = saved(tmp_path / "base", target, **changes)
    source = write(tmp_path / "head", model, some_head(kind, model))
    if expected.startswith(("Eagle", "Llama")):
        export(source, form, tmp_path / "out")
        assert told(tmp_path / "out")["architectures"] == [expected]
        assert ("layer_types" in told(tmp_path / "out")) == (target == "qwen3")
        return
    with pytest.raises(UserError) as caught:
        export(source, form, tmp_path / "out")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_commands_that_load_it(
    base: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write(tmp_path / "head", base, some_head("eagle3", base, reduced=True)))
    said = {}
    for form in FORMS:
        app(["export", "--to", form, source, str(tmp_path / form)], standalone_mode=False)
        said[form] = capsys.readouterr().out.splitlines()
        assert said[form][0].startswith(f"{tmp_path / form}: an EAGLE-3 head of ")
        assert said[form][0].endswith(f" for {base.name_or_path}")
    assert f'"method": "eagle3", "model": "{tmp_path / "vllm"}"' in said["vllm"][1]
    assert "--speculative-algorithm EAGLE3 --speculative-draft-model-path" in said["sglang"][1]
    assert said["eagle"][1].endswith(f"--ea-model-path {tmp_path / 'eagle'} --use_eagle3")
    model = str(base.name_or_path)
    app(["import", "--model", model, str(tmp_path / "sglang"), str(tmp_path / "back")], standalone_mode=False)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'back'}: an EAGLE-3 head of ")
    assert (tmp_path / "back" / FILES[0]).read_bytes() == (tmp_path / "head" / FILES[0]).read_bytes()
    for form in ("medusa", "tgi"):
        with pytest.raises(
            UserError, match=f"--to '{form}': heads '.*' are an EAGLE head; give one of eagle, sgl"
        ):
            app(["export", "--to", form, source, str(tmp_path / "no")], standalone_mode=False)
    with pytest.raises(UserError, match="are no EAGLE head; give one of medusa, tgi, vllm"):
        app(["export", "--to", "sglang", str(tmp_path), str(tmp_path / "no")], standalone_mode=False)


@pytest.mark.parametrize("suffix", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_that_is_cut_short_is_named(suffix: str, tmp_path: Path) -> None:
    """Whose embedding goes along."""
    model = saved(tmp_path / "base")
    source = write(tmp_path / "head", model, some_head("eagle", model))
    path = tmp_path / "base" / "model.safetensors"
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.unlink()
    (path.parent / suffix).write_bytes(half)
    with pytest.raises(UserError, match=rf"base': {suffix} is cut short or damaged"):
        export(source, "eagle", tmp_path / "out")
