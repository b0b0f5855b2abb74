"""What a recipe names is looked at before anything is written, so that a mistake costs seconds."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from layerskip_model.errors import UserError
from train.config import Recipe
from train.data.tokenizer import load_tokenizer
from train.model import check_fits, outline_model, tokenizer_config
from train.objectives import OBJECTIVES


def check_inputs(recipe: Recipe[Any]) -> None:
    """Look whether the data is there and whether model, tokenizer and objective go together.

    Loads no weights, reads the first document of every source, writes nothing. Raises UserError for what
    would otherwise fail minutes later.
    """
    if recipe.log.wandb is not None and find_spec("wandb") is None:
        raise UserError(
            "log.wandb: the wandb package is not installed; pip install wandb, or remove the section"
        )
    heldout = recipe.data.heldout if isinstance(recipe.data.heldout, list) else []
    for source in [*recipe.data.train, *heldout]:
        next(source.documents())
    model = outline_model(recipe.model)
    tokenizer = tokenizer_config(recipe.model)
    if tokenizer.train is not None:
        vocab_size = tokenizer.train.vocab_size
    else:
        assert tokenizer.name_or_path is not None
        vocab_size = len(load_tokenizer(tokenizer.name_or_path))
    check_fits(recipe.model, model, vocab_size, recipe.batch.length)
    # The objective knows which exits a model of this depth has, and the like; the length of the run is no matter.
    any_length = recipe.model_copy(update={"max_steps": recipe.max_steps or 1})
    with suppress(
        RuntimeError
    ):  # something that needs the weights' values: it is looked at when they are there
        OBJECTIVES[recipe.objective.kind].build(any_length, model)
