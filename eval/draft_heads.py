"""Load drafting heads for a target: in its dtype, on its device, trained on its weights."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from eval.decoding.drafters.eagle import LEVELS, EagleDraft
from eval.decoding.drafters.eagle2 import Eagle2
from eval.decoding.drafters.heads import DraftHeads
from eval.decoding.drafters.hydra import HydraDraft
from eval.decoding.drafters.medusa import MedusaDraft
from eval.decoding.growing import Shape
from eval.decoding.published_trees import DEFAULT, PUBLISHED, published_tree
from eval.decoding.settings import nearest
from eval.decoding.static_tree import TreeShape, read_tree, read_tree_file
from eval.decoding.strategies import STRATEGIES
from eval.head_check import require_probe
from eval.target import Target
from layerskip_model.errors import UserError
from layerskip_model.formats.eagle import eagle_kind, load_eagle
from layerskip_model.formats.heads import heads_directory
from layerskip_model.formats.hydra import load_hydra
from layerskip_model.formats.medusa import load_medusa
from layerskip_model.rope import rope_of, spoken_rope

HEADS_OF = {"medusa_num_heads": "medusa", "hydra_num_heads": "hydra"}
"""what the config.json of heads has -> the strategy that drafts with them"""
EAGLE_OF = {"eagle": "eagle2", "eagle3": "eagle3"}
TREE_FILE = "tree.json"  # beside heads: the trees that are best for them
PATHS, GROWTH = "paths", "growth"  # in it: a static tree, and the settings of dynamic ones
GROWTH_SETTINGS = ("num_speculations", "tree_top_k", "tree_tokens")
CHAIN = "chain"
# What an EAGLE head drafts where nothing lies beside it: a chain on a CPU, and on a GPU what was published.
CHAIN_DRAFTS = 5
EAGLE_TREE = "eagle_mc_sim_7b_63"
EAGLE_GROWTH = Shape(6, 10, 60)


def load_medusa_draft(target: Target, name: str) -> MedusaDraft:
    """Medusa heads. Raises UserError for those of another model."""
    directory = heads_directory(name)
    heads = load_medusa(directory, target.runner.backbone)
    heads = heads.to(target.runner.dtype).requires_grad_(False).eval()
    tree = saved_tree(directory, heads.number, default_tree(heads.number, target.runner.device))
    return MedusaDraft(name, heads, heads.number, tree)


def load_hydra_draft(target: Target, name: str) -> HydraDraft:
    """Hydra heads. Raises UserError for those of another model."""
    directory = heads_directory(name)
    heads = load_hydra(directory, target.runner.backbone)
    heads = heads.to(target.runner.dtype).requires_grad_(False).eval()
    tree = saved_tree(directory, heads.number, default_tree(heads.number, target.runner.device))
    return HydraDraft.of(name, heads, tree, target.runner)


def load_eagle_draft(target: Target, name: str) -> EagleDraft:
    """An EAGLE or EAGLE-3 head. Raises UserError for one of another model, and for one that is told it wrongly."""
    directory, runner = heads_directory(name), target.runner
    if (strategy := drafting_strategy(name)) in HEADS_OF.values():
        raise UserError(f"heads '{name}' are no EAGLE head; draft with the strategy {strategy}")
    head = load_eagle(directory, runner.backbone)
    head = head.to(runner.dtype).requires_grad_(False).eval()
    tree = saved_tree(directory, LEVELS, default_tree(CHAIN_DRAFTS, runner.device, EAGLE_TREE))
    draft = EagleDraft.of(name, head, runner, tree=tree, growth=saved_growth(directory, runner.device))
    if not require_probe(draft, runner, directory) and head.layer.rope is not None:
        own = spoken_rope(head.layer.rope.parameters)
        ours = spoken_rope(rope_of(runner.backbone.config.to_dict(), head.layer.kind))
        say(
            f"heads '{name}' turn positions as their config.json says ({own}), not as the model does ({ours}), and no "
            "probe tells whether they were trained so; if not, correct config.json"
        )
    return draft


def saved_growth(directory: Path, device: torch.device) -> Shape:
    """What lies beside an EAGLE head about dynamic trees; where there is nothing, what it drafts on that device.

    Raises UserError for a damaged file.
    """
    content = saved_content(directory)
    if not isinstance(content, dict) or GROWTH not in content:
        return EAGLE_GROWTH if device.type == "cuda" else Shape(CHAIN_DRAFTS, 1, CHAIN_DRAFTS)
    told = content[GROWTH]
    values = [told.get(name, 0) for name in GROWTH_SETTINGS] if isinstance(told, dict) else [0]
    if all(type(value) is int and value > 0 for value in values):
        shape = Shape(*values)
        if shape.count <= shape.proposed:
            return shape
    raise UserError(
        f"tree '{directory / TREE_FILE}': {GROWTH} is {told!r:.80}; give {', '.join(GROWTH_SETTINGS)}, whole numbers "
        "from 1 on and no more tokens than the levels propose, or run python -m eval tree again"
    )


def growth_settings(shape: Shape) -> dict[str, int]:
    """The settings of `eagle2` and `eagle3` that ask for such trees, as they stand beside a head."""
    return dict(zip(GROWTH_SETTINGS, (shape.depth, shape.width, shape.count), strict=True))


def has_tree(directory: Path) -> bool:
    """Whether a tree lies beside heads."""
    return (directory / TREE_FILE).is_file()


def saved_content(directory: Path) -> Any:
    """What lies beside heads about trees; None where nothing does. Raises UserError for a damaged file."""
    path = directory / TREE_FILE
    return read_tree_file(path, str(path)) if path.is_file() else None


def saved_tree(directory: Path, heads: int, default: TreeShape) -> TreeShape:
    """The static tree that lies beside heads, cut to as many levels; the default where there is none."""
    content = saved_content(directory)
    if content is None or (isinstance(content, dict) and GROWTH in content and PATHS not in content):
        return default
    tree = read_tree(directory / TREE_FILE)
    return fitting(replace(tree, name=TREE_FILE), heads)  # a report names the heads already


def default_tree(chain: int, device: torch.device, published: str = DEFAULT) -> TreeShape:
    """On a GPU the published tree, as much of it as that many heads can draft, elsewhere a chain of so many.

    A GPU verifies 64 rows of a large model in little more time than one, a CPU hardly.
    """
    return published_tree(published).cut(depth=chain) if device.type == "cuda" else TreeShape.chain(chain)


def say_default(strategy: str, settings: dict[str, Any]) -> None:
    """Where nothing is asked for and no tree lies beside the heads: what is drafted, and what finds a better one."""
    draft: DraftHeads = settings["draft"]
    is_growing = issubclass(STRATEGIES[strategy], Eagle2)
    asks = GROWTH_SETTINGS if is_growing else ("tree",)
    if has_tree(heads_directory(draft.name)) or any(settings.get(name) is not None for name in asks):
        return
    own = draft.growth if isinstance(draft, EagleDraft) and is_growing else draft.tree
    say(
        f"heads '{draft.name}' have no {TREE_FILE}: by default they draft {described(own)}; python -m eval tree finds "
        "their best one"
    )


def described(tree: TreeShape | Shape) -> str:
    """A chain or a tree in words."""
    if tree.is_chain:
        return f"a chain of {tree.depth}"
    if isinstance(tree, TreeShape):
        return f"{tree.size} nodes of the tree '{tree.name}'"
    return f"{tree.count} nodes of trees that grow {tree.depth} levels, {tree.width} wide"


def named_tree(name: str, heads: int) -> TreeShape:
    """The tree that a user means: `chain`, one that was published, or a JSON file. Raises UserError."""
    if name == CHAIN:
        return TreeShape.chain(heads)
    if name in PUBLISHED:
        return fitting(published_tree(name), heads)
    if not Path(name).is_file():
        known = (CHAIN, *PUBLISHED)
        raise UserError(
            f"tree '{name}' is neither a file nor a published tree{nearest(name, known)}; there are {', '.join(known)}"
        )
    return fitting(read_tree(name), heads)


def fitting(tree: TreeShape, heads: int) -> TreeShape:
    """The tree, cut to as many levels as there are heads, which is said."""
    if tree.depth <= heads:
        return tree
    cut = tree.cut(depth=heads)
    say(
        f"tree '{tree.name}' has {tree.depth} levels and there are {heads} heads: cut to {cut.size} of its "
        f"{tree.size} nodes"
    )
    return cut


@cache
def say(line: str) -> None:
    """Print a line on standard error, once in a program however often it is said."""
    print(line, file=sys.stderr)


def drafting_strategy(name: str) -> str:
    """The strategy that a draft of this name is for, by the config.json in its directory. Raises UserError."""
    directory = heads_directory(name)
    if (kind := eagle_kind(directory)) is not None:
        return EAGLE_OF[kind]
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what its loader will refuse
        config = {}
    return next((strategy for key, strategy in HEADS_OF.items() if key in config), "speculative_sampling")
