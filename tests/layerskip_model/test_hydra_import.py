"""Released Hydra heads in our form: the same tensors, bound to their model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.errors import UserError
from layerskip_model.formats.heads_import import import_heads
from layerskip_model.formats.hydra import load_hydra
from layerskip_model.formats.medusa_export import export_medusa
from tests.layerskip_model.test_hydra_format import some_heads, write
from tests.layerskip_model.test_medusa_format import saved

WEIGHTS = "hydra_lm_head.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return saved(tmp_path_factory.mktemp("base"))


def released(directory: Path, base: PreTrainedModel, *, prefix: bool) -> Path:
    """Heads as their authors store them: a pickle, a short configuration, and the model's own embedding among them."""
    write(directory, base, some_heads(base, prefix_attention=prefix), torch.float16)
    tensors = load_file(directory / WEIGHTS) | {"input_embed_fn.weight": torch.zeros(64, 32)}
    (directory / WEIGHTS).unlink()
    torch.save(tensors, directory / "hydra_lm_head.pt")
    config = json.loads((directory / "config.json").read_text())
    for key in ("base_fingerprint", "hidden_size", "vocab_size", "shared_projection"):
        del config[key]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("prefix", [False, True])
def test_what_is_imported_is_what_was_released(prefix: bool, base: PreTrainedModel, tmp_path: Path) -> None:
    source = released(tmp_path / "theirs", base, prefix=prefix)
    (tmp_path / "ours").mkdir()
    written = import_heads(str(source), str(base.name_or_path), tmp_path / "ours")
    assert (written.kind, written.heads, written.layers, written.dtype) == ("Hydra", 2, 2, torch.float16)
    theirs = torch.load(source / "hydra_lm_head.pt", weights_only=True)
    ours = load_file(tmp_path / "ours" / WEIGHTS)
    assert ours.keys() == theirs.keys() - {"input_embed_fn.weight"}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert all(tensor.dtype == torch.float16 for tensor in ours.values())
    heads = [load_hydra(place, Backbone(base)).state_dict() for place in (source, tmp_path / "ours")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_another_model_and_another_form_are_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    source = released(tmp_path / "theirs", base, prefix=True)
    other = saved(tmp_path / "other", vocab_size=65)
    with pytest.raises(UserError, match="of another model"):
        import_heads(str(source), str(other.name_or_path), tmp_path / "out")
    with pytest.raises(UserError, match=r"medusa_num_heads is None in config\.json; these are no Medusa"):
        export_medusa(str(source), "medusa", tmp_path / "out")
    file = source / "hydra_lm_head.pt"
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"hydra_lm_head\.pt is cut short"):
        import_heads(str(source), str(base.name_or_path), tmp_path / "out")
