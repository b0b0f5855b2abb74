"""What `python -m eval tree` prints of a search and what it leaves beside the heads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from eval.columns import Column, number
from eval.decoding.growing import Shape
from eval.draft_heads import GROWTH, PATHS, TREE_FILE, described, growth_settings
from eval.environment import describe_environment
from eval.report import fitting_table, write_whole
from eval.target import Target
from eval.tree_ranks import SHOWN, Accuracy
from eval.tree_search import Candidate, Findings, Request, Search
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
        return ("best " if row is best else "") + ("chain" if row.shape.is_chain else "tree")

    def width(row: Candidate) -> str:
        return str(row.shape.width)

    grows = isinstance(best.shape, Shape)
    return [
        Column("Tree", "Whether no node has two children.", kind),
        Column("Nodes", "Nodes beside the root.", lambda row: str(row.shape.size)),
        Column("Levels", "How deep it is.", lambda row: str(row.shape.depth)),
        *(
            [Column("Top-k", "Children of a node, and nodes of a level that get any.", width)]
            if grows
            else []
        ),
        Column(
            "Tokens a step",
            "Acceptance length, on texts that it was not chosen by.",
            lambda row: number(row.length),
        ),
        Column("Draft ms", "Drafting, a step.", lambda row: number(row.draft, ".2f", 1000)),
        Column(
            "Rest ms", "Verification, and the rest of the step.", lambda row: number(row.verify, ".2f", 1000)
        ),
        Column(
            "Predicted",
            "Tokens per second over plain decoding's, by these times.",
            lambda row: f"{row.predicted:.2f}x",
        ),
        Column(
            "Raced",
            "The same by the time of decoding the same prompts in turn.",
            lambda row: "" if row.raced is None else f"{row.raced:.2f}x",
        ),
    ]


def tree_tables(found: Findings) -> list[Table | Text]:
    """How good the heads are, and what trees of theirs are expected to give."""
    tables: list[Table | Text] = []
    if found.accuracies:
        tables.append(fitting_table("Heads, on the model's own text", ACCURACY_COLUMNS, found.accuracies))
    for search in found.searches:
        title = "Trees" if len(found.searches) == 1 else f"Trees of {search.strategy}"
        table = fitting_table(title, tree_columns(search.best), search.shown)
        table.caption = Text(
            f"Over {found.texts} texts, after {search.costs.length} tokens; a plain step takes "
            f"{search.costs.plain * 1000:.2f} ms."
        )
        tables += [Text(), table] if tables else [table]
    return tables


def save_trees(target: Target, found: Findings, request: Request, place: Path) -> Path:
    """Write tree.json: a static tree's paths, the most useful first, the settings of dynamic ones, and what chose."""
    content: dict[str, Any] = {}
    for search in found.searches:
        shape = search.best.shape
        content |= {GROWTH: growth_settings(shape)} if isinstance(shape, Shape) else {PATHS: shape.paths}
    content |= {
        "model": target.name,
        "draft": found.draft,
        "texts": found.texts,
        "searches": {search.strategy: _told(search) for search in found.searches},
        "accuracies": [asdict(one) for one in found.accuracies],
        "settings": asdict(request),
        "environment": describe_environment(target, seed=request.choosing.seed).model_dump(mode="json"),
    }
    path = place / TREE_FILE
    write_whole(path, json.dumps(content, indent=1) + "\n")
    return path


def _told(search: Search) -> dict[str, Any]:
    """What a strategy's tree was chosen by."""
    best = search.best
    return {
        "acceptance_length": best.length,
        "predicted_speedup": best.predicted,
        "speedup": best.raced,
        "seconds": asdict(search.costs),
    }


def place_beside(draft: str) -> str:
    """The directory of the heads of that name. Raises UserError for a hub name."""
    if not Path(draft).is_dir():
        raise UserError(
            f"--draft '{draft}' is no directory here, so give --output_dir: where {TREE_FILE} goes"
        )
    return str(heads_directory(draft))


def summary(found: Findings, path: Path) -> str:
    """What was chosen, whether it pays, and how it is used from now on, a line for each strategy."""
    is_beside = path.parent.resolve() == heads_directory(found.draft).resolve()
    return "\n".join(_line(search, path, is_beside) for search in found.searches)


def _line(search: Search, path: Path, is_beside: bool) -> str:
    shape, speedup = search.best.shape, search.best.raced or 0.0
    if isinstance(shape, Shape):
        name = described(shape)
        given = " ".join(f"--{key} {value}" for key, value in growth_settings(shape).items())
    else:
        name = described(shape) if shape.is_chain else f"{shape.size} nodes of {shape.depth} levels"
        given = f"it as --tree {path}"
    used = f"{search.strategy} drafts it by default" if is_beside else f"give {given}"
    pays = "" if speedup > 1.0 else ": no tree is faster than plain decoding here"
    return f"tree: {path}: {name}, {speedup:.2f}x plain decoding{pays}; {used}"
