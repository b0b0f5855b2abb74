"""EAGLE and EAGLE-3 heads in the forms that other programs load. What they would compute otherwise is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from layerskip_model.errors import UserError
from layerskip_model.formats import heads as files
from layerskip_model.formats.base_tensors import base_embedding
from layerskip_model.formats.eagle import StoredEagle, read_eagle
from layerskip_model.formats.eagle_config import EAGLE, EAGLE3, IDS, NAMES, NORM_FIRST, told_layers
from layerskip_model.formats.eagle_names import EMBEDDING, LAYER, LM_HEAD, TABLES
from layerskip_model.formats.huggingface import DTYPES
from layerskip_model.formats.record import carry_record
from layerskip_model.rope import rope_of, rope_words
from layerskip_model.runner import KINDS

LLAMA, QWEN3 = "LlamaForCausalLM", "Qwen3ForCausalLM"
LIKE_LLAMA = ("llama", "mistral")  # model types whose layers compute alike
PLAIN = {f"self_attn.{name}_proj.weight" for name in "qkvo"} | {
    f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")
}
OF_QWEN3 = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
WITH_NORM_FIRST = ("vllm", "speculators")  # forms that can say it
OF_SPECULATORS = (
    "speculators_model_type",
    "speculators_version",
    "speculators_config",
    "transformer_layer_config",
)
OF_THE_HEAD = (
    "draft_head",
    "base_model_name_or_path",
    "base_fingerprint",
    "feature_layers",
    "draft_vocab_size",
    NORM_FIRST,
)
DRAFTS = 5  # in a chain, where a program wants to be told
ALLOWED = 1e-2  # how much a bias that moved may change what fc makes, relatively
SOME = 4096  # tokens that this is looked at for


class EagleWritten(NamedTuple):
    """What was written.

    Attributes:
        kind: EAGLE or EAGLE3.
        parameters: of the head itself.
        base: the model that it is for, as its user loads it.
        bytes: of the file of weights.
        note: what is different from the head that was read, in words; empty where nothing is.
    """

    kind: str
    parameters: int
    dtype: torch.dtype
    base: str
    bytes: int
    note: str = ""


class Source(NamedTuple):
    """A head to write, and the model that it is for."""

    head: StoredEagle
    base: str
    name: str


Form = Callable[[Path, Source], tuple[Path, str]]


def export_eagle(name: str, form: str, directory: Path, dtype: str | None = None) -> EagleWritten:
    """Write a head into an empty directory as other programs load it.

    Args:
        name: a directory of a head, the run that trained it, or a hub name.
        form: one of FORMS.
        dtype: a name in DTYPES; default: its own.

    Raises UserError for a head that cannot be read or that the program would compute otherwise.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    place = files.source_of(name)
    head = read_eagle(place.directory)
    base = str(place.model or head.config.get("base_model_name_or_path") or "BASE")
    _require_layer(name, form, head)
    if dtype is not None:
        head = replace(head, tensors={key: _cast(key, value, dtype) for key, value in head.tensors.items()})
    path, note = FORMS[form](directory, Source(head, base, name))
    carry_record(place.directory, directory, head.dtype)
    parameters = sum(value.numel() for key, value in head.tensors.items() if key not in TABLES)
    return EagleWritten(head.kind, parameters, head.dtype, base, path.stat().st_size, note)


def _as_eagle(directory: Path, source: Source) -> tuple[Path, str]:
    """As the first authors load it. Their EAGLE wants the model's embedding in the file, and all names to be there."""
    head, config, tensors = source.head, _config(source, LLAMA), source.head.tensors
    if head.kind == EAGLE:
        tensors = tensors | {EMBEDDING: base_embedding(source.base).to(head.dtype)}
        if "fc.bias" not in tensors:
            config["bias"] = False
    files.write_config(directory, config)
    path = directory / "pytorch_model.bin"
    torch.save(tensors, path)
    return path, ""


def _as_vllm(directory: Path, source: Source) -> tuple[Path, str]:
    """As vLLM 0.32 does: embedding and LM head are the model's where the file has none; fc never has a bias."""
    head = source.head
    if head.kind == EAGLE3:
        target = _target(head)
        architecture = f"{target}Eagle3" if target == LLAMA else f"Eagle3{target}"
        return _write(directory, _config(source, architecture), head.tensors), ""
    config = _config(source, f"Eagle{LLAMA}")
    if "fc.bias" not in head.tensors:
        return _write(directory, config, head.tensors), ""
    note = "the bias of fc, which it has no place for, moved into an embedding of its own"
    return _write(directory, config, _folded(source)), note


def _as_sglang(directory: Path, source: Source) -> tuple[Path, str]:
    """As SGLang does: fc of EAGLE always has a bias, and an index names the layer whose *output* is taken."""
    head, tensors, note = source.head, source.head.tensors, ""
    if head.kind == EAGLE3:
        config = _config(source, f"{LLAMA}Eagle3")
        _, reads = told_layers(config)
        if reads is not None:
            config["feature_layers"] = reads
            config["eagle_config"] = {"use_aux_hidden_state": True, IDS: [layer - 1 for layer in reads]}
        return _write(directory, config, tensors), note
    if "fc.bias" not in tensors:
        tensors = tensors | {"fc.bias": torch.zeros(len(tensors["fc.weight"]), dtype=head.dtype)}
        note = "a bias of zeros added, which it would else draw at random"
    return _write(directory, _config(source, f"{LLAMA}Eagle"), tensors), note


def _as_speculators(directory: Path, source: Source) -> tuple[Path, str]:
    """As the library `speculators` and vLLM do; EAGLE-3 only."""
    head = source.head
    if head.kind == EAGLE:
        raise UserError(
            f"heads '{source.name}' are an EAGLE head, and --to speculators has EAGLE-3 only; use --to vllm"
        )
    config = _config(source, "Eagle3Speculator")
    outer = (*OF_THE_HEAD, "architectures", "torch_dtype")
    inner = {key: value for key, value in config.items() if key not in (*outer, "eagle_config", IDS)}
    written = {key: config[key] for key in outer if key in config} | {
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        IDS: told_layers(config)[1],
        "transformer_layer_config": inner,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": DRAFTS}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": source.base, "architectures": [_target(head)]},
        },
    }
    tensors = {key.replace(LAYER[EAGLE3], "layers.0."): value for key, value in head.tensors.items()}
    tensors[EMBEDDING] = base_embedding(source.base).to(head.dtype)
    return _write(directory, written, tensors), ""


FORMS: dict[str, Form] = {
    "eagle": _as_eagle,
    "vllm": _as_vllm,
    "sglang": _as_sglang,
    "speculators": _as_speculators,
}


def _target(head: StoredEagle) -> str:
    """The class of model whose layer it has."""
    return QWEN3 if head.config.get("model_type") == "qwen3" else LLAMA


def _config(source: Source, architecture: str) -> dict[str, Any]:
    """The configuration of the head's layer, a Llama's as one, with what is ours beside it.

    Without `bias`, at which vLLM and SGLang would give the layer biases. RoPE is told in all words, also where the
    head's configuration leaves it to a default: programs differ in that.
    """
    head = source.head
    config = {key: value for key, value in head.config.items() if key not in (*OF_SPECULATORS, "bias")}
    if _target(head) == LLAMA:
        config["model_type"] = "llama"
        config.pop(
            "layer_types", None
        )  # of which vLLM would look for that of a layer after the target's last
    config |= rope_words(rope_of(config, KINDS[0]))  # the only kind of attention that is exported
    config["architectures"] = [architecture]
    config["torch_dtype"] = str(head.dtype).removeprefix("torch.")
    config |= {"draft_head": head.kind, "base_model_name_or_path": source.base, "tie_word_embeddings": False}
    if head.kind == EAGLE3:
        config["draft_vocab_size"] = len(head.tensors[LM_HEAD])
        config[NORM_FIRST] = head.norm_before_residual
    return config


def _folded(source: Source) -> dict[str, Tensor]:
    """Without the bias of fc: with [W_e ; W_f] its weight, W_e (E(x) + v) = W_e E(x) + b for v = W_e^-1 b.

    Raises UserError where W_e has no such v, or what fc makes of E(x) + v is off by more than a little in 16 bits, in
    which vLLM serves unless it is told otherwise.
    """
    tensors, dtype = dict(source.head.tensors), source.head.dtype
    bias = tensors.pop("fc.bias").double()
    embedding = base_embedding(source.base).double()
    weight = tensors["fc.weight"][:, : embedding.shape[1]].double()
    moved = embedding + torch.linalg.lstsq(weight, bias[:, None], driver="gelsd").solution[:, 0]
    served = dtype if dtype.itemsize == 2 else torch.bfloat16
    every = slice(None, None, max(1, len(moved) // SOME))
    expected = embedding[every] @ weight.T + bias
    off = ((moved[every].to(served).double() @ weight.T - expected).norm() / expected.norm()).item()
    if not off <= ALLOWED:
        raise UserError(
            f"heads '{source.name}': vLLM has no bias in fc, and moved into an embedding in "
            f"{str(served).removeprefix('torch.')} it makes fc's output off by {off:.0%}; train with "
            "objective.bias: false"
        )
    return tensors | {EMBEDDING: moved.to(dtype)}


def _require_layer(name: str, form: str, head: StoredEagle) -> None:
    """Refuse a layer that the program has no class for. Raises UserError."""
    model_type = head.config.get("model_type", "llama")
    if "hidden_size" not in head.config:
        raise UserError(f"heads '{name}': config.json has no hidden_size; import them with --model first")
    layers = {key.removeprefix(LAYER[head.kind]) for key in head.tensors if key.startswith(LAYER[head.kind])}
    of_layer = {key for key in layers if key.startswith(("self_attn.", "mlp."))}
    takes_qwen = head.kind == EAGLE3 and form in ("vllm", "speculators")
    if model_type == "qwen3" and takes_qwen:
        fits = of_layer == PLAIN | OF_QWEN3
    else:
        fits = model_type in LIKE_LLAMA and of_layer == PLAIN
    if not fits:
        known = "a Llama's or Qwen3's" if takes_qwen else "a Llama's"
        raise UserError(
            f"heads '{name}': --to {form} has {NAMES[head.kind]} heads on {known} layer, and this is one of model type "
            f"'{model_type}'"
        )
    if head.norm_before_residual and form not in WITH_NORM_FIRST:
        raise UserError(
            f"heads '{name}': {NORM_FIRST} is true in config.json, and --to {form} always adds the residual before the "
            f"norm; use --to {' or '.join(WITH_NORM_FIRST)}"
        )
    windows = head.config.get("layer_types") or []
    if "sliding_attention" in windows or (not windows and head.config.get("sliding_window") is not None):
        raise UserError(
            f"heads '{name}': their layer sees a window of {head.config.get('sliding_window')} tokens, which --to "
            f"{form} cannot say"
        )


def _cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    return tensor if name in TABLES else tensor.to(DTYPES[dtype])


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path = directory / "model.safetensors"
    files.write_config(directory, config)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})
    return path
