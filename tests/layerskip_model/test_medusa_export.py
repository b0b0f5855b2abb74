"""Medusa heads in the forms of others and theirs in ours: the same numbers, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats.heads import HeadsWritten
from layerskip_model.formats.heads_import import import_heads
from layerskip_model.formats.medusa import load_medusa
from layerskip_model.formats.medusa_export import FORMS, export_medusa
from layerskip_model.formats.record import RECORD_FILE, Record, write_record
from tests.layerskip_model.test_medusa_format import saved, some_heads, write

STATES = torch.randn(5, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return saved(tmp_path_factory.mktemp("base"))


class TheirBlock(nn.Module):
    """As the authors of Medusa built theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


def their_heads(tensors: dict[str, Tensor], heads: int, layers: int) -> nn.ModuleList:
    """Heads by the names of v0.1, which must be all that there are."""
    built = [
        nn.Sequential(*(TheirBlock() for _ in range(layers)), nn.Linear(32, 64, bias=False))
        for _ in range(heads)
    ]
    module = nn.ModuleList(built)
    module.load_state_dict(tensors, strict=True)
    return module


def by_vllm(tensors: dict[str, Tensor], config: dict[str, Any], head: int) -> Tensor:
    """The logits of a head, computed from vLLM's names and configuration."""
    state = STATES
    for layer in range(config["num_hidden_layers"]):
        name = f"blocks.{head}.layers.{layer}"
        bias = tensors[f"{name}.bias"] if config["medusa_fc_bias"] else None
        state = state + F.silu(F.linear(state, tensors[f"{name}.weight"], bias))
    projection = tensors[f"lm_heads.{0 if config['original_lm_head'] else head}.weight"]
    return state @ projection[: config["truncated_vocab_size"]].T


def export(source: Path, form: str, out: Path, **options: Any) -> HeadsWritten:
    out.mkdir(parents=True)
    return export_medusa(str(source), form, out, **options)


def told(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def released(directory: Path, tensors: dict[str, Tensor], suffix: str = ".pt", **changes: Any) -> Path:
    """Heads with a configuration as short as that of the first ones released."""
    directory.mkdir()
    config = {
        "medusa_num_heads": 3,
        "medusa_num_layers": 2,
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
    }
    (directory / "config.json").write_text(json.dumps(config | changes))
    path = directory / f"medusa_lm_head{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    return directory


def some_tensors(dtype: torch.dtype = torch.float16, heads: int = 3) -> dict[str, Tensor]:
    module = nn.ModuleList(
        nn.Sequential(TheirBlock(), TheirBlock(), nn.Linear(32, 64, bias=False)) for _ in range(heads)
    )
    return {name: value.to(dtype) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("shared", [False, True])
def test_every_form_computes_the_same_logits(shared: bool, base: PreTrainedModel, tmp_path: Path) -> None:
    ours = some_heads(base, shared=shared)
    source = write(tmp_path / "heads", base, ours)
    expected = [ours.logits(head, STATES) for head in range(3)]
    for form in FORMS:
        written = export(source, form, tmp_path / form)
        config = told(tmp_path / form)
        assert config["base_model_name_or_path"] == written.base == base.name_or_path
        if form == "vllm":
            tensors = load_file(tmp_path / form / "model.safetensors")
            assert len(tensors) == 3 * 2 * 2 + (1 if shared else 3)
            found = [by_vllm(tensors, config, head) for head in range(3)]
            assert (config["model_type"], config["architectures"]) == ("medusa", ["MedusaModel"])
            assert (config["num_heads"], config["vocab_size"], config["hidden_size"]) == (3, 64, 32)
        else:
            assert not {"architectures", "model_type"} & config.keys()
            file = tmp_path / form / f"medusa_lm_head.{'pt' if form == 'medusa' else 'safetensors'}"
            tensors = torch.load(file, weights_only=True) if form == "medusa" else load_file(file)
            module = their_heads(tensors, config["medusa_num_heads"], config["medusa_num_layers"])
            found = [head(STATES) for head in module]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_what_a_shared_projection_costs_is_told(base: PreTrainedModel, tmp_path: Path) -> None:
    source = write(tmp_path / "heads", base, some_heads(base, shared=True))
    written = {form: export(source, form, tmp_path / form) for form in FORMS}
    assert {form: one.repeated for form, one in written.items()} == {"medusa": 1, "tgi": 3, "vllm": 1}
    assert written["tgi"].bytes - written["vllm"].bytes == pytest.approx(2 * 64 * 32 * 4, abs=400)
    own = export(write(tmp_path / "own", base, some_heads(base)), "tgi", tmp_path / "tgi-of-own")
    assert own.repeated == 0


@pytest.mark.parametrize("form", ["medusa", "tgi"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_there_and_back_is_the_same_bytes(
    form: str, shared: bool, dtype: torch.dtype, base: PreTrainedModel, tmp_path: Path
) -> None:
    source = write(tmp_path / "heads", base, some_heads(base, shared=shared), dtype)
    write_record(source, Record(1.75, (0.5, 0.25, 0.125)))
    export(source, form, tmp_path / "theirs")
    (tmp_path / "again").mkdir()
    written = import_heads(str(tmp_path / "theirs"), str(base.name_or_path), tmp_path / "again")
    assert (written.heads, written.layers, written.dtype) == (3, 2, dtype)
    for name in ("medusa_lm_head.safetensors", "config.json", RECORD_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_theirs_there_and_back_is_bit_for_bit(
    suffix: str, dtype: torch.dtype, base: PreTrainedModel, tmp_path: Path
) -> None:
    tensors = some_tensors(dtype)
    source = released(tmp_path / "theirs", tensors, suffix, transformers_version="4.38.1", version="2")
    (tmp_path / "ours").mkdir()
    import_heads(str(source), str(base.name_or_path), tmp_path / "ours")
    assert told(tmp_path / "ours")["base_model_name_or_path"] == base.name_or_path
    load_medusa(tmp_path / "ours", Backbone(base))  # the fingerprint is that of the model
    export(tmp_path / "ours", "medusa", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "medusa_lm_head.pt", weights_only=True)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor)


def test_released_heads_are_loaded_where_they_are(
    base: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = some_tensors(torch.float32)
    heads = load_medusa(released(tmp_path / "released", tensors), Backbone(base))
    expected = [head(STATES) for head in their_heads(tensors, 3, 2)]
    for index, logits in enumerate(expected):
        torch.testing.assert_close(heads.logits(index, STATES), logits)
    assert capsys.readouterr().err == ""
    # A configuration that counts fewer heads than there are, as one that was released.
    heads = load_medusa(released(tmp_path / "fewer", tensors, medusa_num_heads=2), Backbone(base))
    assert heads.number == 3
    assert capsys.readouterr().err.endswith("config.json says 2 heads and the file has 3: 3 are used\n")


def test_a_block_that_is_repeated_becomes_blocks_of_their_own(base: PreTrainedModel, tmp_path: Path) -> None:
    """Trainers that multiply a list of one block save it several times in the same memory."""
    tensors = some_tensors()
    for part in ("weight", "bias"):
        tensors[f"1.1.linear.{part}"] = tensors[f"1.0.linear.{part}"]
    source = released(tmp_path / "theirs", tensors)
    (tmp_path / "ours").mkdir()
    import_heads(str(source), str(base.name_or_path), tmp_path / "ours")
    found = load_file(tmp_path / "ours" / "medusa_lm_head.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_dtype_that_is_asked_for(base: PreTrainedModel, tmp_path: Path) -> None:
    source = write(tmp_path / "heads", base, some_heads(base))
    assert export(source, "vllm", tmp_path / "half", dtype="float16").dtype == torch.float16
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    with pytest.raises(UserError, match="--dtype 'int4' is not one of float64, float32"):
        export(source, "vllm", tmp_path / "other", dtype="int4")


def test_a_tokenizer_goes_along_to_tgi(base: PreTrainedModel, tmp_path: Path) -> None:
    source = write(tmp_path / "heads", base, some_heads(base))
    (source / "tokenizer.json").write_text("{}")
    for form in FORMS:
        export(source, form, tmp_path / form)
        assert (tmp_path / form / "tokenizer.json").exists() == (form == "tgi")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vocab_size": 65}, "of another model: 0.2.weight is [64, 32], and this one, of vocabulary 65"),
        ({"hidden_size": 16}, "of another model: 0.0.linear.weight is [32, 32]"),
        ({"intermediate_size": 40}, "with other weights than"),
    ],
)
def test_an_import_for_another_model_is_refused(
    change: dict[str, int], expected: str, base: PreTrainedModel, tmp_path: Path
) -> None:
    source = export_of_ours(base, tmp_path)
    other = saved(tmp_path / "other", **change)
    with pytest.raises(UserError) as caught:
        import_heads(str(source), str(other.name_or_path), tmp_path / "out")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def export_of_ours(base: PreTrainedModel, tmp_path: Path) -> Path:
    export(write(tmp_path / "heads", base, some_heads(base)), "medusa", tmp_path / "theirs")
    return tmp_path / "theirs"


class Spy:
    """What runs a command when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (Path.touch, (self.place,))


def test_files_that_cannot_be_trusted_or_read(base: PreTrainedModel, tmp_path: Path) -> None:
    backbone = Backbone(base)
    directory = released(tmp_path / "released", some_tensors())
    file, config = directory / "medusa_lm_head.pt", told(directory)
    whole = file.read_bytes()

    def message() -> str:
        with pytest.raises(UserError) as caught:
            load_medusa(directory, backbone)
        text = str(caught.value)
        assert text.startswith(f"heads '{directory}': ")
        assert "\n" not in text
        return text

    torch.save({"0.0.linear.weight": Spy(tmp_path / "ran")}, file)
    assert "medusa_lm_head.pt is cut short, damaged or holds more than tensors" in message()
    file.write_bytes(pickle.dumps(Spy(tmp_path / "ran"), protocol=2))
    assert "save a plain state_dict" in message()
    assert not (tmp_path / "ran").exists()
    for length in (0, 100, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:length])
        assert "medusa_lm_head.pt is cut short" in message()
    for content in ([torch.zeros(2)], {"heads": {"0.0.linear.weight": torch.zeros(2)}}):
        torch.save(content, file)
        assert "is no plain state_dict" in message()
    torch.save({name: value for name, value in some_tensors().items() if name != "1.1.linear.bias"}, file)
    assert (
        "the file of weights lacks '1.1.linear.bias', by config.json there are 3 heads of 2 blocks"
        in message()
    )
    torch.save(some_tensors(heads=2), file)
    assert "lacks '2.0.linear.bias'" in message()
    torch.save({}, file)
    assert "lacks '0.0.linear.bias'" in message()
    torch.save({name: value for name, value in some_tensors().items() if "linear" in name}, file)
    assert "no head has a projection after its 2 blocks; heads that use the model's own LM head" in message()
    for changed, expected in (
        ({"medusa_num_heads": 0}, "medusa_num_heads is 0 in config.json; these are no Medusa heads"),
        ({"medusa_num_layers": None}, "medusa_num_layers is None in config.json"),
        ({"medusa_num_heads": None, "hydra_num_heads": 4}, "these are no Medusa heads"),
    ):
        (directory / "config.json").write_text(json.dumps(config | changed))
        assert expected in message()
    file.unlink()
    (directory / "config.json").write_text(json.dumps(config))
    assert "there is no medusa_lm_head.safetensors or .pt in it" in message()
