"""The first layers as a checkpoint of their own: what they compute, what lies beside them, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, PreTrainedModel
from transformers.models.llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.smollm3 import SmolLM3Config

from eval.decoding.drafters.speculative_sampling import DraftModel
from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats.draft_model import export_draft_model, first_layers
from layerskip_model.formats.huggingface import load_model
from layerskip_model.runner import Runner
from tests.tiny_models import CONFIGS, agreeing_model, tiny_model

TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(4))


def saved(model: PreTrainedModel, directory: Path) -> str:
    model.save_pretrained(directory)
    return str(directory)


def early_exit(model: PreTrainedModel, exit_layer: int) -> torch.Tensor:
    """The logits of an exit, [2, 9, vocab]: what leaves the layer, by norm and LM head."""
    backbone = Backbone(model)
    states: list[torch.Tensor] = []
    layer = backbone.layers[exit_layer - 1]
    hook = layer.register_forward_hook(lambda module, args, output: states.append(output))
    with torch.inference_mode():
        model(input_ids=TOKENS, use_cache=False)
        hook.remove()
        return backbone.logits(states[0])


def exported(model: PreTrainedModel, exit_layer: int, place: Path) -> PreTrainedModel:
    """The draft model, read back as any engine would."""
    (place / "draft").mkdir()
    export_draft_model(saved(model, place / "whole"), exit_layer, place / "draft")
    loaded = AutoModelForCausalLM.from_pretrained(place / "draft")
    assert loaded.config.get_text_config().num_hidden_layers == exit_layer
    return loaded


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_its_logits_are_those_of_the_exit(kind: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(kind, tie_word_embeddings=tied)
    draft = exported(model, 3, tmp_path)
    assert draft.dtype == torch.float64  # as it was stored
    with torch.inference_mode():
        torch.testing.assert_close(draft(input_ids=TOKENS).logits, early_exit(model, 3), rtol=1e-6, atol=1e-8)
    assert (draft.get_output_embeddings().weight is draft.get_input_embeddings().weight) == tied
    names = set(load_file(tmp_path / "draft" / "model.safetensors"))
    assert ("lm_head.weight" in names) == (not tied)
    assert not any(".layers.3." in name for name in names)


def test_the_comparison_sees_another_layer(tmp_path: Path) -> None:
    model = tiny_model()
    draft = exported(model, 2, tmp_path)
    with torch.inference_mode():
        logits = draft(input_ids=TOKENS).logits
    assert (logits - early_exit(model, 2)).abs().max() < 1e-6
    assert (logits - early_exit(model, 3)).abs().max() > 0.1


def test_as_draft_model_it_proposes_what_the_exit_proposes(tmp_path: Path) -> None:
    """Speculative sampling with the export is self-speculation: the same tokens, the same acceptance."""
    whole = agreeing_model(layers=2, scale=0.2)
    exported(whole, 2, tmp_path)
    target = Runner(whole)
    draft = DraftModel("draft", Runner(load_model(str(tmp_path / "draft"), dtype="float64")))
    prompts = [[3, 5, 7, 9], [8, 6, 4]]
    found = [
        decode(
            target,
            make_drafter(name, target, num_speculations=3, **extra),
            prompts,
            max_new_tokens=20,
            eos_token_ids=(),
        )
        for name, extra in (
            ("self_speculative", {"exit_layer": 2}),
            ("speculative_sampling", {"draft": draft}),
        )
    ]
    for ours, theirs in zip(*found, strict=True):
        assert theirs.tokens == ours.tokens
        assert (theirs.proposals_at, theirs.accepted_at) == (ours.proposals_at, ours.accepted_at)
    assert 0 < sum(row.accepted for row in found[0]) < sum(row.drafted for row in found[0])


def test_what_is_per_layer_is_cut() -> None:
    gemma = tiny_model("gemma3").config
    assert len(gemma.layer_types) == 4
    assert first_layers(gemma, 2).layer_types == gemma.layer_types[:2]
    assert (len(gemma.layer_types), gemma.num_hidden_layers) == (4, 4)  # the given one stays whole
    smol = SmolLM3Config(num_hidden_layers=8, no_rope_layers=[1, 1, 1, 0] * 2)
    assert first_layers(smol, 5).no_rope_layers == [1, 1, 1, 0, 1]
    assert first_layers(LlamaConfig(num_hidden_layers=3, eos_token_id=[7, 8, 9]), 2).eos_token_id == [7, 8, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_and_the_weights_are_the_stored_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(dtype=dtype)
    (tmp_path / "draft").mkdir()
    written = export_draft_model(saved(model, tmp_path / "whole"), 1, tmp_path / "draft")
    weights = load_file(tmp_path / "draft" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {dtype}
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["dtype"] == str(dtype)[6:]
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in weights.items())
    assert (written.exit_layer, written.num_layers, written.dtype) == (1, 4, dtype)
    assert written.parameters == sum(value.numel() for value in weights.values())
    assert written.bytes == sum(value.nbytes for value in weights.values())


def test_a_model_in_several_files(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    (tmp_path / "draft").mkdir()
    export_draft_model(str(tmp_path / "whole"), 2, tmp_path / "draft")
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    with torch.inference_mode():
        torch.testing.assert_close(draft(input_ids=TOKENS).logits, early_exit(model, 2))


def test_what_lies_beside_the_weights_is_copied(tmp_path: Path) -> None:
    whole = Path(saved(tiny_model(), tmp_path / "whole"))
    texts = {
        "tokenizer.json": '{"made up": 1}',
        "tokenizer_config.json": "{}",
        "tokenizer.model": "sentence pieces",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "generation_config.json": '{"temperature": 0.3, "do_sample": false}',  # such that saving it is refused
    }
    (whole / "additional_chat_templates").mkdir()
    for name, text in texts.items():
        (whole / name).write_text(text)
    (whole / "README.md").write_text("about another model")
    (tmp_path / "draft").mkdir()
    export_draft_model(str(whole), 1, tmp_path / "draft")
    written = {str(p.relative_to(tmp_path / "draft")) for p in (tmp_path / "draft").rglob("*") if p.is_file()}
    assert written == {*texts, "config.json", "model.safetensors"}
    for name, text in texts.items():
        assert (tmp_path / "draft" / name).read_text() == text


# --- what is refused ---------------------------------------------------------------------------------------


def message(model: str, exit_layer: int, place: Path) -> str:
    with pytest.raises(UserError) as caught:
        export_draft_model(model, exit_layer, place / "never")
    assert not (place / "never").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_exit_layers_that_there_are_not(tmp_path: Path) -> None:
    whole = saved(tiny_model(), tmp_path / "whole")
    for exit_layer in (-1, 0, 4, 5):
        text = message(whole, exit_layer, tmp_path)
        assert text == (f"--exit_layer {exit_layer}: the model has 4 layers; give a whole number from 1 to 3")
    assert "one layer only" in message(saved(tiny_model(num_hidden_layers=1), tmp_path / "one"), 1, tmp_path)


def changed(directory: str, **changes: Any) -> str:
    path = Path(directory) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_models_that_cannot_be_cut(tmp_path: Path) -> None:
    assert "no such directory" in message("/no/where", 1, tmp_path)
    quantized = changed(saved(tiny_model(), tmp_path / "q"), quantization_config={"quant_method": "gptq"})
    assert "stored quantized" in message(quantized, 1, tmp_path)
    encoder = tmp_path / "encoder"
    BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(encoder)
    assert "decoder-only language model" in message(str(encoder), 1, tmp_path)
    other = changed(saved(tiny_model(), tmp_path / "t5"), model_type="t5", num_layers=4)
    assert "is no decoder-only language model" in message(other, 1, tmp_path)


def test_weights_that_are_missing_or_of_another_model_are_refused_as_ever(tmp_path: Path) -> None:
    """Only deeper layers may be left where they are."""
    whole = changed(saved(tiny_model(), tmp_path / "whole"), model_type="qwen3", layer_types=None)
    assert "cannot be loaded: the checkpoint lacks" in message(whole, 2, tmp_path)
    other = tmp_path / "whole" / "model.safetensors"
    weights = load_file(other) | {"model.layers.1.extra.weight": torch.zeros(1)}
    save_file(weights, other, {"format": "pt"})
    changed(whole, model_type="llama")
    assert "has no place for: 'model.layers.1.extra.weight';" in message(whole, 2, tmp_path)
    (tmp_path / "never").mkdir()
    export_draft_model(whole, 1, tmp_path / "never")  # where that is one of the deeper ones


def test_layers_that_depend_on_the_depth_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(tiny_model(), tmp_path / "whole")
    build = LlamaDecoderLayer.__init__

    def scaled(self: Any, config: Any, layer_idx: int) -> None:
        build(self, config, layer_idx)
        self.mlp.residual_scale = config.num_hidden_layers**-0.5

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", scaled)
    assert "builds layer 1 otherwise in a model of 2 layers (mlp.residual_scale)" in message(
        whole, 2, tmp_path
    )
