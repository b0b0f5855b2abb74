"""Every recipe in recipes/ is parsed as it stands, then built small and stepped once; new files are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.train.small_recipe import write_documents
from tests.train.tiny_heads import write_base
from train.config import Recipe, load_recipe
from train.loop import train
from train.objectives import OBJECTIVES
from train.objectives.eagle_config import Eagle3Config
from train.section import FrozenModelSection

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if "accelerate" not in path.parts  # configurations of engines
)

SMALL_VOCABULARY = 200  # of a head that says fewer tokens than its model's 280


def small_config(recipe: Recipe[Any]) -> dict[str, Any]:
    """The recipe's own architecture, or a Llama in place of a checkpoint: as deep as its exits need, and thin."""
    own = recipe.model.config or {}
    early_exit = recipe.model_dump()["objective"].get("early_exit") or {}
    exits = early_exit.get("exits", "all")
    deepest = max(exits, default=1) if isinstance(exits, list) else 2
    thin = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    limits = {"num_hidden_layers": deepest + 1, "max_position_embeddings": 64}
    tied = {key: own[key] for key in ("tie_word_embeddings",) if key in own}
    return {"model_type": own.get("model_type", "llama")} | thin | limits | tied


def small_model(path: Path, directory: Path, files: list[str]) -> dict[str, Any]:
    """A new model, or where heads are trained for one that exists, a small one of those."""
    whole = load_recipe(path)
    if isinstance(whole.objective, FrozenModelSection):
        text = Path(files[0]).parent
        layers = 7 if isinstance(whole.objective, Eagle3Config) else 4  # it reads three of them
        return {"name_or_path": str(write_base(directory / "base", text, num_hidden_layers=layers))}
    return {
        "config": small_config(whole),
        "tokenizer": {"train": {"vocab_size": 280}},
        "activation_checkpointing": whole.model.activation_checkpointing,
    }


def small(path: Path, directory: Path, files: list[str]) -> Recipe[Any]:
    """The recipe with everything large replaced, through the command line's overrides."""
    changes = {
        "output_dir": str(directory / "out"),
        "max_steps": 1,
        "max_tokens": None,
        "epochs": None,
        "batch": {"sequences": 4, "length": 16, "micro": 2},
        "model": small_model(path, directory, files),
        "data": {"train": [{"kind": "text", "files": files}], "heldout": 0.2},
        "schedule.warmup_steps": 0,
        "schedule.kind": "constant",  # a falling one is at zero in the last step
        "log.wandb": None,
    }
    if getattr(load_recipe(path).objective, "draft_vocab_size", None) is not None:
        changes["objective.draft_vocab_size"] = SMALL_VOCABULARY
    return load_recipe(path, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def test_there_are_recipes() -> None:
    assert ROOT / "recipes" / "quickstart" / "layerskip.yaml" in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_recipe_is_valid_and_trains(path: Path, tmp_path: Path) -> None:
    whole = load_recipe(path)
    assert whole.output_dir.startswith("runs/")
    recipe = small(path, tmp_path, write_documents(tmp_path))
    own = whole.objective.model_dump()  # the method is the recipe's own
    if own.get("draft_vocab_size") is not None:
        own["draft_vocab_size"] = SMALL_VOCABULARY
    assert recipe.objective.model_dump() == own
    assert recipe.optimizer == whole.optimizer
    directory = train(recipe)
    run = json.loads((directory / "run.json").read_text())
    assert run["kind"] == whole.objective.kind
    assert run["training"]["steps"] == 1
    steps = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in steps if "loss" in row]
    assert len(losses) == 1
    assert 0.0 < losses[0] < 20.0
    weights = load_file(next((directory / "export").glob("*.safetensors")))
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_every_method_has_a_recipe() -> None:
    kinds = {yaml.safe_load(path.read_text())["objective"]["kind"] for path in RECIPES}
    assert kinds == set(OBJECTIVES)
