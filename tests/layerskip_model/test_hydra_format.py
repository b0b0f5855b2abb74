"""Hydra heads on disk: the released names, an exact round trip, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats.fingerprint import fingerprint
from layerskip_model.formats.hydra import load_hydra, write_hydra
from layerskip_model.hydra import HydraHeads
from tests.layerskip_model.test_medusa_format import saved

WEIGHTS = "hydra_lm_head.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A model that was loaded from files of its own."""
    return saved(tmp_path_factory.mktemp("base"))


def some_heads(model: PreTrainedModel, **changes: Any) -> HydraHeads:
    torch.manual_seed(4)
    settings = {"heads": 2, "layers": 2, "prefix_attention": False} | changes
    heads = HydraHeads.new(Backbone(model), **settings)
    for parameter in heads.parameters():
        parameter.data += torch.randn(parameter.shape)
    return heads


def write(
    directory: Path, model: PreTrainedModel, heads: HydraHeads, dtype: torch.dtype = torch.float32
) -> Path:
    directory.mkdir()
    name = str(model.name_or_path)
    weights = fingerprint(Path(name))
    write_hydra(directory, heads, heads.state_dict(), dtype=dtype, base=name, base_fingerprint=weights)
    return directory


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_what_is_written_is_read_again(
    prefix: bool, shared: bool, base: PreTrainedModel, tmp_path: Path
) -> None:
    heads = some_heads(base, prefix_attention=prefix, shared=shared)
    again = load_hydra(write(tmp_path / "heads", base, heads), Backbone(base))
    assert (again.number, again.layers, again.shared) == (2, 2, shared)
    assert (again.prefix is not None) == prefix
    ours, theirs = heads.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(parameter.requires_grad for parameter in again.parameters())
    # Rounded once, it does not change any more.
    rounded = load_hydra(write(tmp_path / "rounded", base, heads, torch.bfloat16), Backbone(base))
    write(tmp_path / "twice", base, rounded, torch.bfloat16)
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("rounded", "twice")]
    assert files[0] == files[1]
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}


def test_the_layout_is_the_released_one(base: PreTrainedModel, tmp_path: Path) -> None:
    """By the modules of github.com/zankner/Hydra: without a prefix, and with one, where dropouts are counted too."""
    both = ("weight", "bias")
    directory = write(tmp_path / "plain", base, some_heads(base))
    plain = load_file(directory / WEIGHTS)
    expected = {f"hydra_mlp.{i}.{j}.linear.{part}" for i in range(2) for j in range(2) for part in both}
    expected |= {f"hydra_mlp.{i}.0.res_connection.{part}" for i in range(2) for part in both}
    assert plain.keys() == expected | {f"hydra_lm_head.{i}.{part}" for i in range(2) for part in both}
    assert plain["hydra_mlp.1.0.linear.weight"].shape == (32, 3 * 32)
    assert plain["hydra_mlp.1.1.linear.weight"].shape == (32, 32)
    assert plain["hydra_lm_head.1.weight"].shape == (64, 32)
    told = json.loads((directory / "config.json").read_text())
    assert (told["hydra_num_heads"], told["hydra_num_layers"], told["hydra_head_arch"]) == (2, 2, "mlp")
    assert told["grounded_heads"] is True
    assert told["base_model_name_or_path"] == base.name_or_path

    directory = write(tmp_path / "plus", base, some_heads(base, prefix_attention=True))
    plus = load_file(directory / WEIGHTS)
    expected = {f"hydra_mlp.{i}.{j}.linear.{part}" for i in range(2) for j in (1, 3) for part in both}
    expected |= {f"hydra_mlp.{i}.1.res_connection.{part}" for i in range(2) for part in both}
    expected |= {f"hydra_lm_head.{i}.1.{part}" for i in range(2) for part in both}
    layer = dict(base.model.layers[0].named_parameters())
    expected |= {f"prefix_embeding_layer.layers.0.{name}" for name in layer}
    assert plus.keys() == expected | {"prefix_embeding_layer.norm.weight"}
    assert json.loads((directory / "config.json").read_text())["hydra_head_arch"] == "prefix-mlp"


def test_a_shared_projection_is_there_once(base: PreTrainedModel, tmp_path: Path) -> None:
    sizes = []
    for shared in (False, True):
        directory = write(tmp_path / str(shared), base, some_heads(base, shared=shared))
        sizes.append(sum(tensor.numel() for tensor in load_file(directory / WEIGHTS).values()))
    assert sizes[0] - sizes[1] == 64 * 32 + 64


def test_released_files_have_copies_of_the_models_own(base: PreTrainedModel, tmp_path: Path) -> None:
    """They are passed over; the configuration may lack what is ours."""
    heads = some_heads(base, prefix_attention=True)
    directory = write(tmp_path / "heads", base, heads)
    tensors = load_file(directory / WEIGHTS)
    own = {
        "input_embed_fn.weight": torch.zeros(64, 32),
        "prefix_embeding_layer.embed_tokens.weight": torch.zeros(64, 32),
        "prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    (directory / WEIGHTS).unlink()
    torch.save(tensors | own, directory / "hydra_lm_head.pt")
    told = {
        "hydra_num_heads": 2,
        "hydra_num_layers": 2,
        "hydra_head_arch": "prefix-mlp",
        "grounded_heads": True,
    }
    (directory / "config.json").write_text(json.dumps(told))
    again = load_hydra(directory, Backbone(base)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in heads.state_dict().items())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vocab_size": 65}, "is [64, 32], and this one, of vocabulary 65"),
        ({"hidden_size": 16}, "heads.* are of another model"),
        (
            {"intermediate_size": 40},
            "are of another model: prefix_embeding_layer.layers.0.mlp.gate_proj.weight",
        ),
        ({"num_hidden_layers": 3}, "with other weights than"),
    ],
)
def test_heads_of_another_model_are_refused(
    change: dict[str, int], expected: str, base: PreTrainedModel, tmp_path: Path
) -> None:
    directory = write(tmp_path / "heads", base, some_heads(base, prefix_attention=True))
    other = saved(tmp_path / "other", **change)
    with pytest.raises(UserError) as caught:
        load_hydra(directory, Backbone(other))
    assert expected.removeprefix("heads.* ") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hydra_num_heads": 3}, "lacks 'hydra_lm_head.2.1.bias'"),
        ({"hydra_num_layers": 1}, "has beside them 'hydra_mlp.0.3.linear.bias'"),
        ({"hydra_num_heads": 0}, "hydra_num_heads is 0 in config.json; these are no Hydra heads"),
        ({"hydra_head_arch": "mlp"}, "by config.json there are 2 heads of 2 blocks; export"),
        ({"hydra_head_arch": "cross-attn"}, "hydra_head_arch is 'cross-attn' in config.json; only mlp and"),
        ({"grounded_heads": False}, "grounded_heads is not true in config.json"),
        ({"hidden_state_offset": 2}, "hidden_state_offset is 2 in config.json"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    change: dict[str, Any], expected: str, base: PreTrainedModel, tmp_path: Path
) -> None:
    directory = write(tmp_path / "heads", base, some_heads(base, prefix_attention=True))
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        load_hydra(directory, Backbone(base))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    backbone = Backbone(base)
    directory = write(tmp_path / "heads", base, some_heads(base, prefix_attention=True))
    path = directory / WEIGHTS
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=r"hydra_lm_head\.safetensors is cut short or damaged"):
        load_hydra(directory, backbone)
    del tensors["prefix_embeding_layer.norm.weight"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"lacks 'prefix_embeding_layer\.norm\.weight'"):
        load_hydra(directory, backbone)
