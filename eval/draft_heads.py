"""Load drafting heads for a target: in its dtype, on its device, trained on its weights."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from eval.decoding.drafters.eagle import EagleDraft
from eval.decoding.drafters.hydra import HydraDraft
from eval.decoding.drafters.medusa import MedusaDraft
from eval.decoding.growing import Shape
from eval.decoding.published_trees import DEFAULT, PUBLISHED, published_tree
from eval.decoding.settings import nearest
from eval.decoding.static_tree import TreeShape, read_tree
from eval.target import Target
from layerskip_model.errors import UserError
from layerskip_model.formats.eagle import load_eagle
from layerskip_model.formats.heads import heads_directory
from layerskip_model.formats.hydra import load_hydra
from layerskip_model.formats.medusa import load_medusa

HEADS_OF = {"medusa_num_heads": "medusa", "hydra_num_heads": "hydra"}
"""what the config.json of heads has -> the strategy that drafts with them"""
TREE_FILE = "tree.json"  # beside heads: the tree that is best for them
CHAIN = "chain"
CHAIN_DRAFTS = 5  # of an EAGLE head, by default


def load_medusa_draft(target: Target, name: str) -> MedusaDraft:
    """Medusa heads. Raises UserError for those of another model."""
    directory = heads_directory(name)
    heads = load_medusa(directory, target.runner.backbone)
    heads = heads.to(target.runner.dtype).requires_grad_(False).eval()
    return MedusaDraft(name, heads, heads.number, saved_tree(directory, heads.number, target.runner.device))


def load_hydra_draft(target: Target, name: str) -> HydraDraft:
    """Hydra heads. Raises UserError for those of another model."""
    directory = heads_directory(name)
    heads = load_hydra(directory, target.runner.backbone)
    heads = heads.to(target.runner.dtype).requires_grad_(False).eval()
    tree = saved_tree(directory, heads.number, target.runner.device)
    return HydraDraft.of(name, heads, tree, target.runner)


def load_eagle_draft(target: Target, name: str) -> EagleDraft:
    """An EAGLE or EAGLE-3 head. Raises UserError for one of another model."""
    directory, runner = heads_directory(name), target.runner
    head = load_eagle(directory, runner.backbone)
    head = head.to(runner.dtype).requires_grad_(False).eval()
    tree = saved_tree(directory, CHAIN_DRAFTS, runner.device)
    return EagleDraft.of(name, head, runner, tree=tree, growth=saved_growth(directory, runner.device))


def saved_growth(directory: Path, device: torch.device) -> Shape:
    """What lies beside a head about dynamic trees; where there is nothing, what such heads draft on that device."""
    return Shape(6, 10, 60) if device.type == "cuda" else Shape(CHAIN_DRAFTS, 1, CHAIN_DRAFTS)


def has_tree(directory: Path) -> bool:
    """Whether a tree lies beside heads."""
    return (directory / TREE_FILE).is_file()


def saved_tree(directory: Path, heads: int, device: torch.device) -> TreeShape:
    """The tree that lies beside heads; where there is none, what heads of that number draft on that device."""
    path = directory / TREE_FILE
    if not path.is_file():
        return default_tree(heads, device)
    return fitting(replace(read_tree(path), name=TREE_FILE), heads)  # a report names the heads already


def default_tree(heads: int, device: torch.device) -> TreeShape:
    """On a GPU the published tree, as much of it as the heads can draft, elsewhere a chain.

    A GPU verifies 64 rows of a large model in little more time than one, a CPU hardly.
    """
    return published_tree(DEFAULT).cut(depth=heads) if device.type == "cuda" else TreeShape.chain(heads)


def say_default(name: str, tree: TreeShape) -> None:
    """Where no tree lies beside the heads of that name: what is drafted, and what finds a better one."""
    if not has_tree(heads_directory(name)):
        say(
            f"heads '{name}' have no {TREE_FILE}: by default they draft {_described(tree)}; python -m eval tree finds "
            "their best one"
        )


def _described(tree: TreeShape) -> str:
    return f"a chain of {tree.depth}" if tree.is_chain else f"{tree.size} nodes of the tree '{tree.name}'"


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
    try:
        config = json.loads((heads_directory(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what its loader will refuse
        config = {}
    return next((strategy for key, strategy in HEADS_OF.items() if key in config), "speculative_sampling")
