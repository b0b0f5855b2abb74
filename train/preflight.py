"""What a recipe names is looked at before anything is written, so that a mistake costs seconds."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch

from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import FLASH_ATTENTION
from train.config import Recipe
from train.data.encoding import check_data
from train.data.tokenizer import load_tokenizer
from train.model import check_fits, outline_model, tokenizer_config
from train.objectives import OBJECTIVES


def check_inputs(recipe: Recipe[Any]) -> None:
    """Look whether the data is there and whether model, tokenizer and objective go together.

    Loads no weights, reads the first document of every source, writes nothing. Raises UserError for what
    would otherwise fail minutes later.
    """
    _check_packages(recipe)
    _check_quantization(recipe)
    _check_attention(recipe)
    model = outline_model(recipe.model)
    tokenizer = tokenizer_config(recipe.model)
    if tokenizer.train is not None:
        vocab_size = tokenizer.train.vocab_size
        check_data(recipe.data, None)
    else:
        assert tokenizer.name_or_path is not None
        loaded = load_tokenizer(tokenizer.name_or_path)
        vocab_size = len(loaded)
        check_data(recipe.data, loaded)
    check_fits(recipe.model, model, vocab_size, recipe.batch.length)
    # The objective knows which exits a model of this depth has, and the like; the length of the run is no matter.
    any_length = recipe.model_copy(update={"max_steps": recipe.max_steps or 1})
    with suppress(
        RuntimeError
    ):  # something that needs the weights' values: it is looked at when they are there
        OBJECTIVES[recipe.objective.kind].build(any_length, model)


def _check_packages(recipe: Recipe[Any]) -> None:
    """Refuse what needs a package that is not there."""
    for wanted, package, key, way_out in (
        (recipe.log.wandb is not None, "wandb", "log.wandb", "remove the section"),
        (recipe.model.lora is not None, "peft", "model.lora", "remove the section"),
        (
            recipe.optimizer.kind == "adamw_8bit",
            "bitsandbytes",
            "optimizer.kind: adamw_8bit",
            "use kind: adamw",
        ),
        (
            recipe.model.quantization is not None,
            "bitsandbytes",
            "model.quantization",
            "leave it out",
        ),
    ):
        if wanted and find_spec(package) is None:
            raise UserError(
                f"{key}: the {package} package is not installed; pip install {package}, or {way_out}"
            )


def _check_quantization(recipe: Recipe[Any]) -> None:
    if recipe.model.quantization is not None and not torch.cuda.is_available():
        raise UserError(
            f"model.quantization: {recipe.model.quantization} needs a CUDA GPU, and there is none; leave it out"
        )


def _check_attention(recipe: Recipe[Any]) -> None:
    """Refuse attention that would see other documents: without a mask they are told apart in a batch of one only."""
    attention = recipe.model.attn_implementation
    most = recipe.batch.micro or recipe.batch.sequences
    if attention in FLASH_ATTENTION and recipe.data.documents == "separate" and most > 1:
        raise UserError(
            f"model.attn_implementation: {attention} keeps documents apart only where a forward has one sequence, not "
            f"{most}; use batch.micro: 1, data.documents: joined or attn_implementation: sdpa"
        )
