"""What a frozen model makes of the rows of a run, computed once and kept: online batches become cached ones.

An objective says which states it learns from (`Objective.features`), and its own forward computes them, as the engine
runs it. Only rows that the run will read are computed; what an earlier run has left is not made again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from eval.environment import versions
from layerskip_model.errors import UserError
from layerskip_model.formats.features import FeatureFiles, Place
from layerskip_model.formats.fingerprint import checkpoint_directory, fingerprint
from layerskip_model.formats.huggingface import DTYPES
from train.config import FeaturesConfig, Recipe
from train.data.batches import collate, evaluated_rows
from train.data.packing import Rows
from train.evaluation import to_device
from train.objectives.base import Objective, States
from train.processes import on_main_process
from train.progress import track
from train.run import Run

SHARD_BYTES = 256 * 10**6  # at most, where a row is not more
INPUTS = ("input_ids", "position_ids")  # of a row, what the states depend on


class FeatureRows:
    """Rows of tokens with the states that are kept of them, as `features` [seq, width]."""

    def __init__(self, windows: Rows, files: FeatureFiles, places: Mapping[int, Place]) -> None:
        self.windows, self.files, self.places = windows, files, places

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.windows[row] | {"features": self.files.read(self.places[row])}


@dataclass(frozen=True)
class Part:
    """The training or the held-out rows of a run, and where their states are kept."""

    name: str
    windows: Rows
    needed: list[int]  # numbers of rows, in order
    files: FeatureFiles
    dtype: torch.dtype
    row_bytes: int

    def missing(self) -> list[int]:
        """The rows that are needed and not there."""
        there = self.files.places()
        return [row for row in self.needed if row not in there]

    def with_features(self) -> FeatureRows:
        """The rows with their states."""
        return FeatureRows(self.windows, self.files, self.files.places())


def add_features(run: Run) -> None:
    """Have the rows of a run come with their states, if its recipe wants that. Every rank calls it.

    Raises UserError for a directory that holds other states, for one that another run fills now, and where the disk
    has not enough room.
    """
    config = run.recipe.features
    if config is None:
        return
    states = wanted_states(run.recipe, run.objective)
    parts, state = parts_of(run, config, states), PartialState()
    with ExitStack() as held:

        def claim() -> None:
            for part in parts:
                held.enter_context(part.files.alone())
            model = made_by(run.recipe, config, states)
            for part in parts:
                rows = {"rows": len(part.windows), "data": digest(part.windows)}
                for name in part.files.claim(model | rows, versions()):
                    run.log.say(f"{part.files.directory / name} is damaged; its rows are made again")
            refuse_no_room(run, parts)

        on_main_process(state, claim)
        for part in parts:
            fill(run, part)
    run.training_rows, run.heldout_rows = (part.with_features() for part in parts)
    run.objective.has_features = True


def wanted_states(recipe: Recipe[Any], objective: Objective[Any]) -> States:
    """What the objective learns from. Raises UserError where that is nothing of a frozen model."""
    states = objective.features()
    if states is None:
        raise UserError(
            f"features: objective.kind {recipe.objective.kind} learns from no states of a frozen model; leave the "
            "section out"
        )
    return states


def bytes_per_token(config: FeaturesConfig, states: States) -> int:
    """On disk."""
    return states.width * DTYPES[config.dtype].itemsize


def parts_of(run: Run, config: FeaturesConfig, states: States) -> list[Part]:
    """Training and held-out rows, and those of them that the run reads."""
    recipe, directory = run.recipe, Path(config.cache).expanduser()
    trained = run.data.rows_of_steps(recipe.total_steps, recipe.batch.sequences, recipe.seed)
    measured = evaluated_rows(len(run.heldout_rows), recipe.evaluate.sequences)
    row_bytes = recipe.batch.length * bytes_per_token(config, states)
    return [
        Part(name, windows, needed, FeatureFiles(directory / name), DTYPES[config.dtype], row_bytes)
        for name, windows, needed in (
            ("train", run.training_rows, trained),
            ("heldout", run.heldout_rows, measured),
        )
    ]


def made_by(recipe: Recipe[Any], config: FeaturesConfig, states: States) -> dict[str, Any]:
    """What decides a row's states, its tokens apart. Reads the model's weights."""
    name = recipe.model.name_or_path
    assert name is not None, "a frozen model is one that exists"
    return {
        "model": name,
        "fingerprint": fingerprint(checkpoint_directory(name)),
        "weights": recipe.model.quantization or recipe.model.dtype,
        "states": states.name,
        "width": states.width,
        "dtype": config.dtype,
        "length": recipe.batch.length,
        "documents": recipe.data.documents,
    }


def digest(rows: Rows) -> str:
    """SHA-256 of the tokens of all rows and their positions."""
    found = hashlib.sha256()
    for number in range(len(rows)):
        row = rows[number]
        for key in INPUTS:
            if key in row:
                found.update(row[key].numpy().tobytes())
    return found.hexdigest()


def refuse_no_room(run: Run, parts: Sequence[Part]) -> None:
    """Say how much will be written. Raises UserError where the disk has less room."""
    directory = parts[0].files.directory.parent
    missing = {part.name: len(part.missing()) for part in parts}
    rows, all_rows = sum(missing.values()), sum(len(part.needed) for part in parts)
    wanted = sum(missing[part.name] * part.row_bytes for part in parts)
    todo = f"{in_words(wanted)} to be made" if rows else "nothing to be made"
    run.log.say(f"features in {directory}: {all_rows - rows:,} of {all_rows:,} rows are there, {todo}")
    free = shutil.disk_usage(directory).free
    if wanted > free:
        raise UserError(
            f"features.cache: {directory} needs {in_words(wanted)} for {rows:,} rows, and {in_words(free)} are "
            "free; name a directory on a larger disk, or leave the section out"
        )


def in_words(size: float) -> str:
    """A number of bytes, in words."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def size_lines(recipe: Recipe[Any], objective: Objective[Any]) -> list[str]:
    """How much a recipe's features take on disk, as far as that is known without its data; nothing without features."""
    config = recipe.features
    if config is None:
        return []
    token = bytes_per_token(config, wanted_states(recipe, objective))
    if recipe.epochs is not None:
        most = f", {in_words(1e6 * token)} a million; how many there are only the tokenised data tells"
    else:
        tokens = recipe.total_steps * recipe.batch.sequences * recipe.batch.length
        most = f"; at most {in_words(tokens * token)} to train on, and the held-out rows"
    return [f"features in {config.cache}: {token:,} bytes a token{most}"]


def fill(run: Run, part: Part) -> None:
    """Compute what is missing, a shard on each rank at a time: the same shards, however many ranks there are."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    missing, size = part.missing(), max(1, SHARD_BYTES // part.row_bytes)
    shards = [missing[first : first + size] for first in range(0, len(missing), size)]
    names = part.files.next_names(len(shards))
    firsts = range(0, len(shards), world)
    for first in track(run.log, f"features, {part.name}", firsts, len(firsts)):
        together, written = shards[first : first + world], names[first : first + world]
        forwards = -(-max(map(len, together)) // run.micro)
        has_one = rank < len(together)
        rows = together[rank] if has_one else missing[:1]
        features = computed(run, part, rows, forwards)
        if has_one:
            part.files.write(written[rank], rows, features)
        run.accelerator.wait_for_everyone()
        on_main_process(PartialState(), partial(part.files.enlist, written))


@torch.no_grad()
def computed(run: Run, part: Part, rows: list[int], forwards: int) -> Tensor:
    """The states of some rows, [n, seq, width], on the CPU, by so many forwards as all ranks have to do."""
    run.module.eval()
    found = []
    for batch in batches_of(part.windows, rows, run.micro, forwards):
        features, _ = run.module(to_device(batch, run.accelerator.device), 0, {})
        found.append(features.to("cpu", part.dtype))
    return torch.cat(found)[: len(rows)]


def batches_of(windows: Rows, rows: list[int], micro: int, forwards: int) -> Iterator[dict[str, Tensor]]:
    """The rows `micro` at a time and without labels; where there are none left the first one again."""
    for first in range(0, forwards * micro, micro):
        chosen = rows[first : first + micro] or rows[:1]
        batch = collate(windows, chosen, list(range(len(chosen))))
        yield {key: values for key, values in batch.items() if key != "labels"}
