"""Training from Python: `train(load_recipe("recipes/quickstart/layerskip.yaml"))`.

The names are imported when they are first used, so that `python -m train --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerskip_model.errors import UserError
    from train.config import Recipe, load_recipe, parse_recipe
    from train.loop import train
    from train.stop import Interrupted

__all__ = ["Interrupted", "Recipe", "UserError", "load_recipe", "parse_recipe", "train"]

_HOMES = {
    "Interrupted": "train.stop",
    "Recipe": "train.config",
    "UserError": "layerskip_model.errors",
    "load_recipe": "train.config",
    "parse_recipe": "train.config",
    "train": "train.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'train' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
