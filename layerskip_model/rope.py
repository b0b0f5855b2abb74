"""How layers turn positions (RoPE, arXiv 2104.09864): what a configuration says of it, and tables other than a model's.

RoPE of one kind of attention is told by parameters as transformers 5 has them: `rope_theta`, `rope_type`, and what the
type needs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerskip_model.backbone import Backbone, rotary_tables

DEFAULT_BASE = 10000.0  # where a configuration names none
DEFAULT_TYPE = "default"
STEADY = (DEFAULT_TYPE, "linear", "llama3", "yarn")  # whose tables do not depend on the length of the text
OF_LENGTH = ("llama3", "yarn", "longrope")  # scaled from the length that a model was first trained with
FIRST_LENGTH = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"


class Rope:
    """RoPE that is not its model's, for a layer of the model's kind.

    Attributes:
        parameters: see above.

    Raises KeyError, TypeError, ValueError or ArithmeticError for parameters of which no tables can be made.
    """

    # No module, whose frequencies would be rounded where its weights are.
    def __init__(self, backbone: Backbone, parameters: Mapping[str, Any]) -> None:
        self.parameters = dict(parameters)
        config = copy.deepcopy(backbone.config)
        config.rope_parameters = in_place_of(config.rope_parameters, parameters)
        rotary_emb: Any = backbone.base.rotary_emb
        with torch.device("cpu"):  # the model's may be on the meta device
            self._rotary_emb = type(rotary_emb)(config)

    def rotary(self, like: Tensor, position_ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """See `Backbone.rotary`."""
        return rotary_tables(self._rotary_emb, like, position_ids, kind)


def in_place_of(model_own: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of a configuration with these instead: for each kind of attention where the model has such."""
    told = model_own if isinstance(model_own, dict) else {}
    return {key: dict(parameters) for key in told if isinstance(told[key], dict)} or dict(parameters)


def rope_of(config: Mapping[str, Any], attention: str) -> dict[str, Any]:
    """The RoPE parameters of layers with that kind of attention, in new words, of a configuration in any."""
    told = _told(config, attention)
    rope_type = told.get("rope_type", told.get("type", DEFAULT_TYPE))
    base = told.get("rope_theta", config.get("rope_theta"))
    found = {"rope_theta": DEFAULT_BASE if base is None else base, "rope_type": rope_type}
    found |= {key: told[key] for key in told if key not in (*found, "type") and told[key] is not None}
    beside = {PARTIAL: config.get(PARTIAL)}
    if rope_type in OF_LENGTH:
        beside[FIRST_LENGTH] = config.get(FIRST_LENGTH) or config.get("max_position_embeddings")
    found |= {key: beside[key] for key in beside if key not in found and beside[key] is not None}
    if found.get(PARTIAL) == 1.0:  # the whole of each head, as without
        del found[PARTIAL]
    return found


def named_bases(config: Mapping[str, Any], attention: str) -> list[Any]:
    """The RoPE bases that a configuration names for layers with that kind of attention; the first one counts."""
    told, beside = _told(config, attention), config.get("rope_theta")
    is_of_kind = told is _told_of_all(config).get(attention)
    return [base for base in (told.get("rope_theta"), None if is_of_kind else beside) if base is not None]


def plain_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE of as many dimensions, with the default base and no scaling."""
    part = {PARTIAL: parameters[PARTIAL]} if PARTIAL in parameters else {}
    return {"rope_theta": DEFAULT_BASE, "rope_type": DEFAULT_TYPE, **part}


def rope_words(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of RoPE, in the words of transformers 5 and of what came before."""
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return {
        "rope_parameters": dict(parameters),
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == DEFAULT_TYPE else scaling,
    }


def spoken_rope(parameters: Mapping[str, Any]) -> str:
    """In one line, its base first."""
    rest = [f"{key} {value}" for key, value in parameters.items() if key != "rope_theta"]
    base = parameters["rope_theta"]
    return ", ".join([f"base {base:g}" if isinstance(base, int | float) else f"base {base!r}", *rest])


def _told(config: Mapping[str, Any], attention: str) -> dict[str, Any]:
    told = _told_of_all(config)
    of_kind = told.get(attention)
    return of_kind if isinstance(of_kind, dict) else told


def _told_of_all(config: Mapping[str, Any]) -> dict[str, Any]:
    told = config.get("rope_parameters") or config.get("rope_scaling")
    return told if isinstance(told, dict) else {}
