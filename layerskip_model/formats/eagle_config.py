"""What the config.json of an EAGLE head says, in any program's words: its kind, its layers, how it turns positions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from layerskip_model.backbone import Backbone
from layerskip_model.eagle3 import feature_layers
from layerskip_model.errors import UserError
from layerskip_model.formats.draft_model import first_layers
from layerskip_model.rope import (
    PARTIAL,
    STEADY,
    Rope,
    in_place_of,
    named_bases,
    rope_of,
    rope_words,
    spoken_rope,
)

EAGLE, EAGLE3 = "eagle", "eagle3"
NAMES = {EAGLE: "EAGLE", EAGLE3: "EAGLE-3"}
IDS = "eagle_aux_hidden_state_layer_ids"
OF_THE_TARGET = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
)
OF_A_FILE = ("transformers_version", "dtype", "torch_dtype", "architectures", "quantization_config")
# What other programs can be told to compute, and the module here does not.
NOT_HERE = ("norm_before_fc", "fc_norm", "norm_output")
NORM_FIRST = "norm_before_residual"


def layer_config(backbone: Backbone, rope: Mapping[str, Any] | None) -> dict[str, Any]:
    """The target's own configuration for one layer; RoPE in the words of transformers 5 and of what came before.

    `rope`: the parameters of the layer's own RoPE, None for the target's.
    """
    config = first_layers(backbone.config, 1).to_diff_dict()
    config = {key: value for key, value in config.items() if key not in OF_A_FILE and key[:1] != "_"}
    if rope is not None:
        config["rope_parameters"] = in_place_of(config.get("rope_parameters"), rope)
    told = _table(config.get("rope_parameters"))
    if "rope_theta" in told:
        config |= rope_words(told)
    return config | {"tie_word_embeddings": False}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the settings of the layer, which `speculators` nests, beside the others."""
    return {**_table(config.get("transformer_layer_config")), **config}


def kind_in(config: Mapping[str, Any]) -> str | None:
    """`eagle` or `eagle3` where the configuration tells it, as all but the first authors' do; else what it says."""
    said = config.get("draft_head", config.get("speculators_model_type"))
    if said is not None:
        return str(said)
    architectures = str(config.get("architectures"))
    if "Eagle3" in architectures or {"eagle_config", IDS, "draft_vocab_size"} & config.keys():
        return EAGLE3
    return EAGLE if "Eagle" in architectures else None


def refusal(directory: str | Path, what: str) -> UserError:
    """The error for a head that cannot be read."""
    return UserError(f"heads '{directory}': {what}")


def require_known(directory: str | Path, kind: str, config: Mapping[str, Any]) -> None:
    """Refuse a head that computes something else than ours. Raises UserError."""
    if config.get("num_hidden_layers", 1) != 1:
        raise refusal(
            directory,
            f"num_hidden_layers is {config['num_hidden_layers']} in config.json; an {NAMES[kind]} head has 1 here",
        )
    if kind == EAGLE:
        if "speculators_model_type" in config:
            raise refusal(
                directory,
                "EAGLE heads by speculators have names of their own, which cannot be read; name its original",
            )
        return
    if "speculators_model_type" in config and NORM_FIRST not in config:
        raise refusal(
            directory,
            f"config.json does not say {NORM_FIRST}, and programs differ in what that means; write the value into it "
            "that the head was trained with",
        )
    inner = _table(config.get("eagle_config"))
    if not inner.get("use_aux_hidden_state", True):
        raise refusal(
            directory, "use_aux_hidden_state is false in config.json; an EAGLE-3 head reads three layers here"
        )
    for key in NOT_HERE:
        if config.get(key) or inner.get(key):
            raise refusal(
                directory, f"{key} is true in config.json, which cannot be computed here; name a head without"
            )


def reads_of(directory: str | Path, config: Mapping[str, Any], num_layers: int) -> tuple[int, int, int]:
    """The layers whose inputs an EAGLE-3 head reads in a model of so many: as told, else the authors' default.

    `feature_layers` is ours. The other programs' word is taken as vLLM does. Raises UserError for layers that are not
    three different ones of the model in order.
    """
    key, told = told_layers(config)
    try:
        if told is not None and not (isinstance(told, list) and all(type(layer) is int for layer in told)):
            raise UserError(f"{told!r} is no list of layers")
        return feature_layers(num_layers, told)
    except UserError as error:
        where = "no layers are named" if told is None else f"{key} is {told}"
        raise UserError(
            f"heads '{directory}' cannot be of this model of {num_layers} layers: {where} in config.json "
            f"({str(error).removeprefix('feature_layers: ')})"
        ) from None


def told_layers(config: Mapping[str, Any]) -> tuple[str, Any]:
    """The key that names the layers an EAGLE-3 head reads, and what it says; None where nothing does."""
    if config.get("feature_layers") is not None:
        return "feature_layers", config["feature_layers"]
    return IDS, config.get(IDS) or _table(config.get("eagle_config")).get(IDS)


def require_target(directory: str | Path, config: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuse a head for a model of other sizes. Raises UserError with both values."""
    target = backbone.config.to_dict()
    for key in OF_THE_TARGET:
        theirs, ours = config.get(key), target.get(key)
        if theirs is not None and ours is not None and theirs != ours:
            raise UserError(
                f"heads '{directory}' are of another model: {key} is {theirs} in config.json, and {ours} in this one"
            )


def own_rope(
    directory: str | Path, config: Mapping[str, Any], backbone: Backbone, attention: str
) -> Rope | None:
    """How a head turns positions in its layer of that kind of attention, where not as the target does; else None.

    Who trains a head makes its tables by the head's own configuration, not the target's. Where that names no base it is
    LlamaConfig's. Raises UserError for what tables cannot be made of, or for one text alone.
    """
    told, ours = rope_of(config, attention), rope_of(backbone.config.to_dict(), attention)
    bases = named_bases(config, attention)
    if any(base != bases[0] for base in bases):
        raise refusal(
            directory,
            f"config.json names two RoPE bases, {bases[0]} in rope_parameters or rope_scaling and {bases[1]} as "
            "rope_theta; write the same into both",
        )
    if told == ours:
        return None
    here, place = torch.empty(0, device="cpu"), torch.ones(1, 1, dtype=torch.long, device="cpu")
    try:
        rope = Rope(backbone, told)
        if not all(table.isfinite().all() for table in rope.rotary(here, place, attention)):
            raise ValueError("not finite")
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise refusal(
            directory,
            f"RoPE of {spoken_rope(told)} in config.json has no tables ({type(error).__name__}: {error}); correct it",
        ) from None
    if told["rope_type"] not in STEADY or told.get(PARTIAL) != ours.get(PARTIAL):
        raise refusal(
            directory,
            f"RoPE of {spoken_rope(told)} in config.json can be computed here where it is the model's, and that is "
            f"{spoken_rope(ours)}; name the model that the head was trained on",
        )
    return rope


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
