"""The tensors of an EAGLE head: their names in its module, in the first authors' files and in other programs'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from layerskip_model.errors import UserError
from layerskip_model.formats.eagle_config import EAGLE, EAGLE3, NAMES, refusal
from layerskip_model.reduced_vocabulary import ReducedVocabulary

EMBEDDING, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
TABLES = ("d2t", "t2d")
LAYER = {EAGLE: "layers.0.", EAGLE3: "midlayer."}
# The longest beginnings first: of a parameter's name in the module, and in the file.
BEGINNINGS = (
    ("layer.layer.layer.self_attn.attention.", "midlayer.self_attn."),
    ("layer.layer.layer.self_attn.", "midlayer."),
    ("layer.layer.layer.", "midlayer."),
    ("layer.layer.", "layers.0."),
    ("projection.", "lm_head."),
)


def name_in_file(parameter: str) -> str:
    """A parameter's name in `EagleHead` or `Eagle3Head` -> its name in the file."""
    for begin, theirs in BEGINNINGS:
        if parameter.startswith(begin):
            return theirs + parameter.removeprefix(begin)
    return parameter


def kind_of_tensors(names: set[str]) -> str | None:
    """Of which kind of head a file with these names is, in any spelling."""
    plain = {name.removeprefix("model.") for name in names}
    if "fc.weight" not in plain:
        return None
    return EAGLE3 if plain & {"d2t", "midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight"} else EAGLE


def respelt(directory: str | Path, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the first authors' names, whoever wrote them; rotary tables, which are the model's, are left out.

    Raises UserError for a name that is there twice.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("model.")
        if plain.endswith("rotary_emb.inv_freq"):
            continue
        if kind == EAGLE3 and plain.startswith("layers.0."):
            plain = LAYER[EAGLE3] + plain.removeprefix("layers.0.")
        if plain in ours:
            raise _damaged(directory, f"the file of weights has '{plain}' twice")
        ours[plain] = tensor
    return ours


def vocabulary_in(
    directory: str | Path, tensors: Mapping[str, Tensor], told: int | None, vocab_size: int
) -> ReducedVocabulary:
    """What an EAGLE-3 head can say, of a model of so many tokens; `told`, draft_vocab_size in config.json.

    Without tables it is all of them; t2d follows from d2t where it is missing. Raises UserError for tables that
    contradict each other, the sizes or the file's LM head.
    """
    d2t, t2d = (tensors.get(name) for name in TABLES)
    rows = len(tensors[LM_HEAD]) if LM_HEAD in tensors else None
    if d2t is None:
        size = told or rows
        if t2d is not None or size != vocab_size:
            raise _damaged(
                directory,
                f"there is no d2t, and draft_vocab_size {size} is not the model's vocabulary, {vocab_size}",
            )
        vocabulary = ReducedVocabulary.whole(vocab_size)
    else:
        vocabulary = ReducedVocabulary(d2t.long(), _kept(directory, d2t.long(), t2d, vocab_size))
    if told is not None and told != vocabulary.size:
        raise _damaged(
            directory, f"draft_vocab_size is {told} in config.json, and d2t has {vocabulary.size} tokens"
        )
    if rows is not None and rows != vocabulary.size:
        raise _damaged(directory, f"{LM_HEAD} has {rows} rows, for {vocabulary.size} tokens in d2t")
    return vocabulary


def require_all(directory: str | Path, kind: str, stored: set[str], wanted: set[str]) -> None:
    """Refuse a file with other names than a head for the model has. Raises UserError."""
    for names, what in ((wanted - stored, "lacks"), (stored - wanted, "has beside them")):
        if names:
            raise refusal(
                directory,
                f"the file of weights {what} '{min(names)}', for an {NAMES[kind]} head on a layer of this model; name "
                "the model that it was trained on, or export it again",
            )


def _damaged(directory: str | Path, what: str) -> UserError:
    return refusal(directory, f"{what}; export them again")


def _kept(directory: str | Path, d2t: Tensor, t2d: Tensor | None, vocab_size: int) -> Tensor:
    """t2d, after a look whether it says the same as d2t."""
    tokens = d2t + torch.arange(len(d2t))
    if not len(tokens) or tokens.min() < 0 or tokens.max() >= vocab_size or not (tokens.diff() > 0).all():
        raise _damaged(
            directory, f"d2t does not name different tokens, in order, of the model's {vocab_size}"
        )
    kept = torch.zeros(vocab_size, dtype=torch.bool)
    kept[tokens] = True
    if t2d is not None and not torch.equal(t2d.bool(), kept):
        raise _damaged(
            directory,
            f"d2t and t2d contradict each other, or t2d ({len(t2d)}) is of another vocabulary ({vocab_size})",
        )
    return kept
