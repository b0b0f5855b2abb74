"""Load drafting heads for a target: in its dtype, on its device, trained on its weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from eval.decoding.drafters.medusa import MedusaDraft
from eval.decoding.static_tree import TreeShape, read_tree
from eval.target import Target, open_run
from layerskip_model.errors import UserError
from layerskip_model.formats.medusa import load_medusa

HEADS_OF = {"medusa_num_heads": "medusa"}
"""what the config.json of heads has -> the strategy that drafts with them"""
TREE_FILE = "tree.json"  # beside heads: the tree that is best for them


def load_medusa_draft(target: Target, name: str) -> MedusaDraft:
    """Medusa heads. Raises UserError for those of another model."""
    directory = heads_directory(name)
    heads = load_medusa(directory, target.runner.backbone)
    heads = heads.to(target.runner.dtype).requires_grad_(False).eval()
    return MedusaDraft(name, heads, heads.number, saved_tree(directory, heads.number))


def heads_directory(name: str) -> Path:
    """Where heads lie: the directory of that name, or what the run there exported. Raises UserError."""
    if not (Path(name) / "run.json").is_file():
        return Path(name)
    heads = open_run(name).heads
    if heads is None:
        raise UserError(f"--draft '{name}': that run trained no heads; name one that did")
    return heads


def saved_tree(directory: Path, heads: int) -> TreeShape:
    """The tree that lies beside heads; where there is none, a chain."""
    path = directory / TREE_FILE
    return fitting(read_tree(path), heads) if path.is_file() else TreeShape.chain(heads)


def named_tree(name: str, heads: int) -> TreeShape:
    """The tree that a user means: `chain`, or a JSON file. Raises UserError."""
    if name == "chain":
        return TreeShape.chain(heads)
    return fitting(read_tree(name), heads)


def fitting(tree: TreeShape, heads: int) -> TreeShape:
    """The tree, cut to as many levels as there are heads, which is said."""
    if tree.depth <= heads:
        return tree
    cut = tree.cut(depth=heads)
    print(
        f"tree '{tree.name}' has {tree.depth} levels and there are {heads} heads: cut to {cut.size} of its "
        f"{tree.size} nodes",
        file=sys.stderr,
    )
    return cut


def drafting_strategy(name: str) -> str:
    """The strategy that a draft of this name is for, by the config.json in its directory. Raises UserError."""
    try:
        config = json.loads((heads_directory(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a hub name, or what its loader will refuse
        config = {}
    return next((strategy for key, strategy in HEADS_OF.items() if key in config), "speculative_sampling")
