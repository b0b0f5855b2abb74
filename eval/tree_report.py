"""What `python -m eval tree` prints of a search and what it leaves beside the heads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from eval.columns import Column, number
from eval.draft_heads import TREE_FILE
from eval.environment import describe_environment
from eval.report import fitting_table, write_whole
from eval.target import Target
from eval.tree_ranks import SHOWN, Accuracy
from eval.tree_search import Candidate, Request, Search
from layerskip_model.errors import UserError
from layerskip_model.formats.heads import heads_directory


def _head(accuracy: Accuracy) -> str:
    return "LM head" if accuracy.head == 0 else f"head {accuracy.head}"


def _top(first: int) -> Column:
    meaning = f"Places where the token that the model says is among the first {first} choices, in %."
    return Column(f"Top-{first}", meaning, lambda row: number(row.top[first], ".1f", 100))


ACCURACY_COLUMNS = [
    Column("Head", "The LM head guesses the next token, head k the one k further on.", _head),
    *map(_top, SHOWN),
    Column("Places", "Places that have the token.", lambda row: f"{row.count:,}"),
]


def tree_columns(best: Candidate) -> list[Column]:
    """Of a table of candidates, `best` marked."""

    def kind(row: Candidate) -> str:
        return ("chain" if row.shape.is_chain else "tree") + (" (best)" if row is best else "")

    return [
        Column("Tree", "Whether no node has two children.", kind),
        Column("Nodes", "Nodes beside the root.", lambda row: str(row.shape.size)),
        Column("Levels", "Heads that draft.", lambda row: str(row.shape.depth)),
        Column(
            "Acceptance length",
            "Tokens a step, on texts that the nodes were not chosen by.",
            lambda row: number(row.length),
        ),
        Column("Draft ms", "Drafting, a step.", lambda row: number(row.draft, ".2f", 1000)),
        Column("Verify ms", "The rest of the step.", lambda row: number(row.verify, ".2f", 1000)),
        Column("Predicted", "Tokens per second over plain decoding's.", lambda row: f"{row.speedup:.2f}x"),
    ]


def tree_tables(search: Search) -> list[Table | Text]:
    """How good the heads are, and what trees of theirs are expected to give."""
    heads = fitting_table("Heads, on the model's own text", ACCURACY_COLUMNS, search.accuracies)
    trees = fitting_table("Trees", tree_columns(search.best), search.shown)
    trees.caption = Text(
        f"Over {search.texts} texts, after {search.costs.length} tokens; a plain step takes "
        f"{search.costs.plain * 1000:.2f} ms."
    )
    return [heads, Text(), trees]


def save_tree(target: Target, search: Search, request: Request, place: Path) -> Path:
    """Write tree.json: the paths, the most useful first, and what they were chosen by."""
    best, costs = search.best, search.costs
    content = {
        "paths": best.shape.paths,
        "strategy": search.strategy,
        "model": target.name,
        "draft": search.draft,
        "acceptance_length": best.length,
        "predicted_speedup": best.speedup,
        "accuracies": [asdict(one) for one in search.accuracies],
        "seconds": asdict(costs),
        "texts": search.texts,
        "settings": asdict(request),
        "environment": describe_environment(target, seed=0).model_dump(mode="json"),
    }
    path = place / TREE_FILE
    write_whole(path, json.dumps(content, indent=1) + "\n")
    return path


def place_beside(draft: str) -> str:
    """The directory of the heads of that name. Raises UserError for a hub name."""
    if not Path(draft).is_dir():
        raise UserError(
            f"--draft '{draft}' is no directory here, so give --output_dir: where {TREE_FILE} goes"
        )
    return str(heads_directory(draft))


def summary(search: Search, path: Path) -> str:
    """What was chosen, whether it pays, and how it is used from now on, in one line."""
    best = search.best
    name = (
        f"a chain of {best.shape.size}"
        if best.shape.is_chain
        else f"{best.shape.size} nodes of {best.shape.depth} levels"
    )
    beside = path.parent.resolve() == heads_directory(search.draft).resolve()
    used = f"{search.strategy} drafts it by default" if beside else f"give it as --tree {path}"
    pays = "" if best.speedup > 1.0 else ": no tree is faster than plain decoding here"
    return f"tree: {path}: {name}, {best.speedup:.2f}x predicted{pays}; {used}"
