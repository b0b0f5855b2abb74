"""Medusa heads in the forms that other programs load. Numbers change only by a dtype that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from layerskip_model.errors import UserError
from layerskip_model.formats import heads as files
from layerskip_model.formats.draft_model import copy_files
from layerskip_model.formats.heads import HeadsWritten
from layerskip_model.formats.huggingface import DTYPES
from layerskip_model.formats.medusa import SHARED, STEM, StoredMedusa, read_medusa
from layerskip_model.formats.record import carry_record


def export_medusa(name: str, form: str, directory: Path, dtype: str | None = None) -> HeadsWritten:
    """Write Medusa heads into an empty directory as other programs load them.

    Args:
        name: a directory of heads, the run that trained them, or a hub name.
        form: one of FORMS.
        dtype: a name in DTYPES; default: each tensor's own.

    Raises UserError for heads that cannot be read and for an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    source = files.source_of(name)
    heads = read_medusa(source.directory)
    if dtype is not None:
        heads = replace(heads, tensors={key: value.to(DTYPES[dtype]) for key, value in heads.tensors.items()})
    base = str(source.model or heads.config.get("base_model_name_or_path") or "BASE")
    written = FORMS[form](directory, heads, base)
    if form == "tgi":
        _copy_tokenizer([source.directory, Path(base)], directory)
    carry_record(source.directory, directory, heads.projection(0).dtype)
    return HeadsWritten(
        "Medusa",
        heads.number,
        heads.layers,
        heads.projection(0).dtype,
        base,
        written.stat().st_size,
        _copies(heads, form),
    )


def _as_medusa(directory: Path, heads: StoredMedusa, base: str) -> Path:
    """Medusa v0.1 as its authors load it, and TensorRT-LLM; a shared projection is stored once under all its names."""
    files.write_config(directory, _config(heads, base))
    path = directory / f"{STEM}.pt"
    torch.save(_unshared(heads), path)
    return path


def _as_tgi(directory: Path, heads: StoredMedusa, base: str) -> Path:
    """As text-generation-inference reads them, since its version 2 before heads that have no projection."""
    files.write_heads(directory, STEM, _unshared(heads), _config(heads, base))
    return directory / f"{STEM}.safetensors"


def _as_vllm(directory: Path, heads: StoredMedusa, base: str) -> Path:
    """A model of vLLM's own. `original_lm_head` is its word for one projection that all heads share."""
    vocab, hidden = heads.sizes
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": hidden,
        "vocab_size": vocab,
        "truncated_vocab_size": vocab,
        "num_heads": heads.number,
        "num_hidden_layers": heads.layers,
        "medusa_fc_bias": True,
        "original_lm_head": heads.shared,
        "base_model_name_or_path": base,
    }
    tensors = {
        f"blocks.{h}.layers.{block}.{part}": heads.tensors[f"{h}.{block}.linear.{part}"]
        for h in range(heads.number)
        for block in range(heads.layers)
        for part in ("weight", "bias")
    }
    projections = 1 if heads.shared else heads.number
    tensors |= {f"lm_heads.{h}.weight": heads.projection(h) for h in range(projections)}
    path = directory / "model.safetensors"
    files.write_config(directory, config)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


FORMS: dict[str, Callable[[Path, StoredMedusa, str], Path]] = {
    "medusa": _as_medusa,
    "tgi": _as_tgi,
    "vllm": _as_vllm,
}


def _config(heads: StoredMedusa, base: str) -> dict[str, Any]:
    """What v0.1 reads, without `model_type` and `architectures`; sizes beside it, which vLLM takes from there."""
    vocab, hidden = heads.sizes
    config = {
        "medusa_num_heads": heads.number,
        "medusa_num_layers": heads.layers,
        "base_model_name_or_path": base,
        "hidden_size": hidden,
        "vocab_size": vocab,
    }
    known = heads.config.get("base_fingerprint")
    return config if known is None else config | {"base_fingerprint": known}


def _unshared(heads: StoredMedusa) -> dict[str, Tensor]:
    """The tensors with a projection for each head, all the same memory where they share it."""
    own = {key: value for key, value in heads.tensors.items() if key != SHARED}
    return own | {f"{h}.{heads.layers}.weight": heads.projection(h) for h in range(heads.number)}


def _copies(heads: StoredMedusa, form: str) -> int:
    if not heads.shared:
        return 0
    return heads.number if form == "tgi" else 1


def _copy_tokenizer(places: list[Path], directory: Path) -> None:
    """TGI's router wants a tokenizer beside heads that lie in a directory; of the first place that has one."""
    for place in places:
        if (place / "tokenizer.json").is_file():
            copy_files(str(place), directory)
            return
