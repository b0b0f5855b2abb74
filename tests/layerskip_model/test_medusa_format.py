"""Medusa heads on disk: the names that others read, an exact round trip, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats.fingerprint import checkpoint_directory, fingerprint
from layerskip_model.formats.medusa import load_medusa, write_medusa
from layerskip_model.medusa import MedusaHeads
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A model that was loaded from files of its own."""
    return saved(tmp_path_factory.mktemp("base"))


def saved(directory: Path, **changes: Any) -> PreTrainedModel:
    tiny_model(dtype=torch.float32, **changes).save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)


def some_heads(model: PreTrainedModel, *, shared: bool = False) -> MedusaHeads:
    torch.manual_seed(4)
    heads = MedusaHeads.new(Backbone(model), heads=3, layers=2, shared=shared)
    for parameter in heads.parameters():
        parameter.data += torch.randn(parameter.shape)
    return heads


def write(
    directory: Path, model: PreTrainedModel, heads: MedusaHeads, dtype: torch.dtype = torch.float32
) -> Path:
    directory.mkdir(parents=True)
    name = str(model.name_or_path)
    weights = fingerprint(Path(name))
    write_medusa(directory, heads, heads.state_dict(), dtype=dtype, base=name, base_fingerprint=weights)
    return directory


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_written_is_read_again(shared: bool, base: PreTrainedModel, tmp_path: Path) -> None:
    heads = some_heads(base, shared=shared)
    again = load_medusa(write(tmp_path / "heads", base, heads), Backbone(base))
    assert (again.number, again.layers, again.shared) == (3, 2, shared)
    ours, theirs = heads.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(parameter.requires_grad for parameter in again.parameters())
    # Rounded once, it does not change any more.
    rounded = load_medusa(write(tmp_path / "rounded", base, heads, torch.bfloat16), Backbone(base))
    write(tmp_path / "twice", base, rounded, torch.bfloat16)
    files = [(tmp_path / name / "medusa_lm_head.safetensors").read_bytes() for name in ("rounded", "twice")]
    assert files[0] == files[1]
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}


def test_the_layout_is_that_of_medusa(base: PreTrainedModel, tmp_path: Path) -> None:
    directory = write(tmp_path / "heads", base, some_heads(base))
    tensors = load_file(directory / "medusa_lm_head.safetensors")
    expected = {f"{h}.{l}.linear.{part}" for h in range(3) for l in range(2) for part in ("weight", "bias")}  # noqa: E741
    assert tensors.keys() == expected | {f"{h}.2.weight" for h in range(3)}
    assert tensors["2.1.linear.weight"].shape == (32, 32)
    assert tensors["2.2.weight"].shape == (64, 32)
    config = json.loads((directory / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (3, 2)
    assert config["base_model_name_or_path"] == base.name_or_path
    assert not {"architectures", "model_type"} & config.keys()


def test_a_shared_projection_is_there_once(base: PreTrainedModel, tmp_path: Path) -> None:
    sizes = []
    for shared in (False, True):
        directory = write(tmp_path / str(shared), base, some_heads(base, shared=shared))
        sizes.append(sum(t.numel() for t in load_file(directory / "medusa_lm_head.safetensors").values()))
    assert sizes[0] - sizes[1] == 2 * 64 * 32


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vocab_size": 65}, "of another model: 0.2.weight is [64, 32], and this one, of vocabulary 65"),
        (
            {"hidden_size": 16},
            "of another model: 0.0.linear.weight is [32, 32], and this one, of vocabulary 64",
        ),
        ({"intermediate_size": 40}, "with other weights than"),
    ],
)
def test_heads_of_another_model_are_refused(
    change: dict[str, int], expected: str, base: PreTrainedModel, tmp_path: Path
) -> None:
    directory = write(tmp_path / "heads", base, some_heads(base))
    other = saved(tmp_path / "other", **change)
    with pytest.raises(UserError) as caught:
        load_medusa(directory, Backbone(other))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_changed_weight_makes_another_model(base: PreTrainedModel, tmp_path: Path) -> None:
    directory = write(tmp_path / "heads", base, some_heads(base))
    saved(tmp_path / "other")
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    load_medusa(directory, Backbone(same))  # the same weights elsewhere
    path = tmp_path / "other" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its fingerprint differs"):
        load_medusa(directory, Backbone(same))


def test_damaged_files_are_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    backbone = Backbone(base)
    with pytest.raises(UserError, match=r"no config\.json in it"):
        load_medusa(tmp_path, backbone)
    directory = write(tmp_path / "heads", base, some_heads(base))
    weights, config = directory / "medusa_lm_head.safetensors", directory / "config.json"
    whole, told = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=r"medusa_lm_head\.safetensors is cut short or damaged"):
        load_medusa(directory, backbone)
    weights.unlink()
    with pytest.raises(UserError, match=r"there is no medusa_lm_head\.safetensors"):
        load_medusa(directory, backbone)
    weights.write_bytes(whole)
    for number, expected in ((4, "lacks '3.0.linear.bias'"), (2, "has beside them '2.0.linear.bias'")):
        config.write_text(json.dumps(told | {"medusa_num_heads": number}))
        with pytest.raises(UserError, match=expected):
            load_medusa(directory, backbone)
    config.write_text(json.dumps(told | {"medusa_num_heads": 0}))
    with pytest.raises(UserError, match=r"medusa_num_heads is 0 in config\.json; these are no Medusa heads"):
        load_medusa(directory, backbone)
    config.write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load_medusa(directory, backbone)


def test_a_checkpoint_that_is_not_here_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'nobody/nothing' is neither a directory nor in the local cache"):
        checkpoint_directory("nobody/nothing")
    with pytest.raises(UserError, match="there are no weights in it"):
        fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    (tmp_path / "consolidated.safetensors").write_bytes(b"the same once more")
    before = fingerprint(tmp_path)
    (tmp_path / "consolidated.safetensors").unlink()
    assert fingerprint(tmp_path) == before
