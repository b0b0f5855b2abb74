"""What drafts for a target and is named in a strategy's settings: loaded once for each target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from eval.decoding.drafters.eagle import EagleDraft
from eval.decoding.drafters.heads import DraftHeads
from eval.decoding.drafters.hydra import HydraDraft
from eval.decoding.drafters.medusa import MedusaDraft
from eval.decoding.strategies import STRATEGIES
from eval.draft_heads import load_eagle_draft, load_hydra_draft, load_medusa_draft, named_tree, say_default
from eval.draft_model import DraftModel, captured_like, load_draft
from eval.target import Target

LOADERS: dict[type, Callable[[Target, str], Any]] = {
    DraftModel: load_draft,
    MedusaDraft: load_medusa_draft,
    HydraDraft: load_hydra_draft,
    EagleDraft: load_eagle_draft,
}

_loaded: WeakKeyDictionary[PreTrainedModel, dict[tuple[type, str, bool], Any]] = WeakKeyDictionary()
"""target's model -> what was loaded for it: by kind, name and whether passes are captured"""


def with_loaded_drafts(target: Target, strategy: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings of a strategy of ours, what is only named in them loaded. Raises UserError."""
    settings = dict(settings)
    if isinstance(settings.get("draft"), str):
        settings["draft"] = loaded(
            target, get_type_hints(STRATEGIES[strategy].Settings)["draft"], settings["draft"]
        )
        if isinstance(settings["draft"], DraftHeads):
            say_default(strategy, settings)
    draft, tree = settings.get("draft"), settings.get("tree")
    if isinstance(draft, DraftHeads) and isinstance(tree, str):
        settings["tree"] = named_tree(tree, draft.number)
    return settings


def loaded(target: Target, kind: type, name: str) -> Any:
    """What is called `name`, of that kind, loaded once. Raises UserError."""
    known = _loaded.setdefault(target.model, {})
    captures = kind is DraftModel and target.runner.fixed_shapes  # a model's own passes; heads have none
    key = kind, name, captures
    if key not in known:
        plain = known.get((kind, name, False))
        known[key] = LOADERS[kind](target, name) if plain is None else captured_like(target.runner, plain)
    return known[key]
