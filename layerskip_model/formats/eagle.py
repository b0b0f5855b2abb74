"""EAGLE and EAGLE-3 heads on disk, as their authors have them (github.com/SafeAILab/EAGLE).

`config.json` is the target's with one layer, and for EAGLE-3 `draft_vocab_size` and the layers that it reads in
`eagle_config`, as vLLM counts them; ours beside that: `draft_head`, eagle or eagle3, `feature_layers`, the model's name
and fingerprint. `model.safetensors` has of EAGLE `fc.*` and `layers.0.*`, of EAGLE-3 `fc.weight`, `midlayer.*`,
`norm.weight`, `lm_head.weight`, and `d2t` and `t2d` unless the vocabulary is the target's. What others call these
things is read as well (`eagle_names`, `eagle_config`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip_model.backbone import Backbone
from layerskip_model.eagle import EagleHead
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.errors import UserError
from layerskip_model.formats import heads as files
from layerskip_model.formats.eagle_config import (
    EAGLE,
    EAGLE3,
    IDS,
    NAMES,
    NORM_FIRST,
    flat,
    kind_in,
    layer_config,
    own_rope,
    reads_of,
    refusal,
    require_known,
    require_target,
)
from layerskip_model.formats.eagle_names import (
    EMBEDDING,
    LM_HEAD,
    TABLES,
    kind_of_tensors,
    name_in_file,
    require_all,
    respelt,
    vocabulary_in,
)

STEM = "model"
Head = EagleHead | Eagle3Head


@dataclass(frozen=True)
class StoredEagle:
    """A head as files have it.

    Attributes:
        kind: EAGLE or EAGLE3.
        reads: the layers whose inputs are fused, of EAGLE-3; None where no model has been asked for their number yet.
        config: all of config.json, with the settings of a nested layer beside the others.
        tensors: by the first authors' names, in their own dtypes; d2t and t2d unless the vocabulary is the target's.
        targets: those that must be the target's own: its embedding, and of EAGLE its LM head.
        rope: the parameters of its own RoPE; None for the target's, and where no model has been asked for its yet.
        norm_before_residual: of EAGLE-3, see `JoinedLayer`.
    """

    kind: str
    reads: tuple[int, int, int] | None
    config: dict[str, Any] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)
    targets: dict[str, Tensor] = field(repr=False)
    rope: dict[str, Any] | None = None
    norm_before_residual: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.tensors["fc.weight"].dtype


def write_eagle(
    directory: Path,
    head: Head,
    state: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    backbone: Backbone,
    base: str,
    base_fingerprint: str,
) -> None:
    """Write a head for the model that is named `base`, whose parts `backbone` has, into a directory that is there.

    `state` is its state_dict with all values, as an engine gathered it; rounded to `dtype`.
    """
    tensors = {name_in_file(name): state[name].to(dtype).contiguous() for name, _ in head.named_parameters()}
    kind = EAGLE
    if isinstance(head, Eagle3Head):
        kind = EAGLE3
        if not head.vocabulary.is_whole:
            tensors |= {name: state[name] for name in TABLES}
    stored = bound(StoredEagle(kind, None, {}, tensors, {}), head)
    write_stored(directory, stored, backbone, base=base, base_fingerprint=base_fingerprint)


def bound(stored: StoredEagle, head: Head) -> StoredEagle:
    """The same with what is known of the head once it is made for a model."""
    rope = None if head.layer.rope is None else head.layer.rope.parameters
    if isinstance(head, EagleHead):
        return replace(stored, rope=rope)
    return replace(stored, rope=rope, reads=head.reads, norm_before_residual=head.norm_before_residual)


def write_stored(
    directory: Path, head: StoredEagle, backbone: Backbone, *, base: str, base_fingerprint: str | None
) -> None:
    """Write a head as it is, for the model that is named `base`, into a directory that is there."""
    config = config_of(head, layer_config(backbone, head.rope), type(backbone.model).__name__)
    ours: dict[str, Any] = {"draft_head": head.kind, "base_model_name_or_path": base}
    ours["base_fingerprint"] = base_fingerprint
    if head.reads is not None:
        ours["feature_layers"] = list(head.reads)
    files.write_heads(directory, STEM, head.tensors, config | ours)


def config_of(head: StoredEagle, layer: dict[str, Any], target: str) -> dict[str, Any]:
    """What most programs read: `layer` is the configuration of its layer, `target` the class of its model.

    A head with a bias is named as SGLang does, for vLLM would drop the bias and say nothing. `bias` is there only where
    it is false, as the authors take it for true, and others give the layer biases then.
    """
    config = layer | {"torch_dtype": str(head.dtype).removeprefix("torch.")}
    if head.kind == EAGLE:
        if "fc.bias" in head.tensors:
            return config | {"architectures": [f"{target}Eagle"]}
        return config | {"architectures": [f"Eagle{target}"], "bias": False}
    assert head.reads is not None
    is_llama = target == "LlamaForCausalLM"
    return config | {
        "architectures": [f"{target}Eagle3" if is_llama else f"Eagle3{target}"],
        "draft_vocab_size": len(head.tensors[LM_HEAD]),
        NORM_FIRST: head.norm_before_residual,
        "eagle_config": {"use_aux_hidden_state": True, IDS: list(head.reads)},
    }


def load_eagle(directory: str | Path, backbone: Backbone) -> Head:
    """The head in a directory, in float32, for the model that it was trained on.

    Raises UserError for files that are missing, damaged or contradict each other, for what cannot be computed here, and
    for a head of another model: of other sizes, layers or vocabulary, or of other weights where that is known.
    """
    stored = read_eagle(directory)
    head = build(stored, backbone, directory)
    files.require_base(directory, stored.config, backbone)
    return head


def read_eagle(directory: str | Path) -> StoredEagle:
    """The head in a directory as it is, ours or that of others. Raises UserError, see `load_eagle`."""
    told = files.read_config(directory, "EAGLE", ())
    config = flat(told)
    tensors = _weights(directory)
    kind = kind_in(config) or kind_of_tensors(set(tensors))
    if kind not in NAMES:
        named = "no head" if kind is None else f"'{kind}'"
        raise refusal(
            directory, f"config.json names {named}, where EAGLE and EAGLE-3 can be read; name such a head"
        )
    require_known(directory, kind, config)
    tensors = respelt(directory, kind, tensors)
    of_target = (EMBEDDING, LM_HEAD) if kind == EAGLE else (EMBEDDING,)
    targets = {name: tensors.pop(name) for name in of_target if name in tensors}
    norm_first = kind == EAGLE3 and bool(config.get(NORM_FIRST))
    return StoredEagle(kind, None, config, tensors, targets, norm_before_residual=norm_first)


def build(stored: StoredEagle, backbone: Backbone, directory: str | Path) -> Head:
    """A head for a model from that of a directory. Raises UserError for one of another model."""
    head: Head
    if stored.kind == EAGLE:
        head = EagleHead(backbone, bias="fc.bias" in stored.tensors)
    else:
        told = stored.config.get("draft_vocab_size")
        vocabulary = vocabulary_in(directory, stored.tensors, told, backbone.vocab_size)
        reads = reads_of(directory, stored.config, backbone.num_layers)
        head = Eagle3Head(backbone, vocabulary, reads, norm_before_residual=stored.norm_before_residual)
    require_target(directory, stored.config, backbone)
    head.layer.rope = own_rope(directory, stored.config, backbone, head.layer.kind)
    names = {name: name_in_file(name) for name, _ in head.named_parameters()}
    require_all(directory, stored.kind, stored.tensors.keys() - set(TABLES), set(names.values()))
    files.fill(head, names, stored.tensors, directory, backbone)
    ours = {EMBEDDING: backbone.embed.weight, LM_HEAD: backbone.head.weight}
    for name, tensor in stored.targets.items():
        require_same(directory, name, tensor, ours[name])  # type: ignore[arg-type]
    return head


def require_same(directory: str | Path, name: str, theirs: Tensor, ours: Tensor) -> None:
    """Refuse a tensor that is not the model's, but for the rounding of either. One on the meta device is not seen."""
    if theirs.shape == ours.shape:
        theirs, ours = theirs.to(ours.device), ours.detach()
        if (
            ours.is_meta
            or torch.equal(theirs.to(ours.dtype), ours)
            or torch.equal(ours.to(theirs.dtype), theirs)
        ):
            return
    raise refusal(
        directory,
        f"its {name} is not this model's; name the model that it was trained on (a head with one of its own cannot be "
        "read)",
    )


def eagle_kind(directory: str | Path) -> str | None:
    """Which kind of head a directory has, EAGLE or EAGLE3; None where there is none that can be made out."""
    try:
        told = files.read_config(directory, "EAGLE", ())
        config = flat(told)
        kind = kind_in(config)
        if kind is None and config.get("num_hidden_layers") == 1:
            kind = kind_of_tensors(set(_weights(directory)))
    except UserError:
        return None
    return kind if kind in NAMES else None


def _weights(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of all files of weights, on the CPU; a pickle's by torch's loader of plain tensors."""
    place = Path(directory)
    found = next((some for pattern in files.LAYER_FILES if (some := sorted(place.glob(pattern)))), [])
    if not found:
        raise refusal(directory, "there is no model.safetensors or pytorch_model.bin in it")
    return {name: tensor for path in found for name, tensor in files.read_tensors(directory, path).items()}
