"""Released EAGLE heads, bound to their model and written as training writes them. No number changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from layerskip_model.errors import UserError
from layerskip_model.formats import heads as files
from layerskip_model.formats.base_tensors import base_embedding, base_lm_head
from layerskip_model.formats.eagle import STEM, bound, build, read_eagle, require_same, write_stored
from layerskip_model.formats.eagle_config import EAGLE3
from layerskip_model.formats.eagle_export import EagleWritten
from layerskip_model.formats.eagle_names import EMBEDDING, LM_HEAD, TABLES, vocabulary_in
from layerskip_model.formats.fingerprint import checkpoint_directory, fingerprint
from layerskip_model.formats.huggingface import load_config, outline
from layerskip_model.formats.record import carry_record

OF_BASE = {EMBEDDING: base_embedding, LM_HEAD: base_lm_head}


def import_eagle(name: str, model: str, directory: Path) -> EagleWritten:
    """Write a head into an empty directory, in our form, for the model that it was trained on.

    Raises UserError for one that cannot be read, and for one of another model as `load_eagle`.
    """
    place = files.heads_directory(name)
    stored = read_eagle(place)
    backbone = outline(model, load_config(model))
    head = build(stored, backbone, name)
    weights = fingerprint(checkpoint_directory(model))
    if (stored.config.get("base_fingerprint") or weights) != weights:
        raise UserError(files.other_weights(name, stored.config, model))
    for key, tensor in stored.targets.items():
        require_same(name, key, tensor, OF_BASE[key](model))
    tensors = stored.tensors
    if "fc.bias" in tensors and not tensors["fc.bias"].any():  # SGLang's form of none
        tensors = {key: value for key, value in tensors.items() if key != "fc.bias"}
    if stored.kind == EAGLE3:
        # Whose vocabulary is whole needs no tables; one of them is enough of others.
        tensors = {key: value for key, value in tensors.items() if key not in TABLES}
        vocabulary = vocabulary_in(name, stored.tensors, None, backbone.vocab_size)
        if not vocabulary.is_whole:
            tensors |= {"d2t": vocabulary.d2t, "t2d": vocabulary.t2d}
    stored = replace(bound(stored, head), tensors=tensors)
    write_stored(directory, stored, backbone, base=model, base_fingerprint=weights)
    carry_record(place, directory, stored.dtype)
    size = (directory / f"{STEM}.safetensors").stat().st_size
    parameters = sum(tensor.numel() for key, tensor in tensors.items() if key not in TABLES)
    return EagleWritten(stored.kind, parameters, stored.dtype, model, size)
