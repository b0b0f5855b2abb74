"""Which prompts a benchmark measures, and which of them are decoded together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from eval.decoding.speculate import check_prompt
from eval.target import Target
from layerskip_model.errors import UserError
from layerskip_model.jsonl import PromptRow

HELDOUT = "heldout"
NUM_SAMPLES = 32


@dataclass(frozen=True)
class Prompt:
    """A prompt to measure. Its index among them is also the number of its stream of random numbers."""

    index: int
    source: str
    tokens: list[int]


Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Prompts that are decoded together, which is what is timed."""

    number: int
    prompts: list[Prompt]

    @property
    def tokens(self) -> list[list[int]]:
        """Each prompt's token ids."""
        return [prompt.tokens for prompt in self.prompts]

    @property
    def streams(self) -> list[int]:
        """Each prompt's stream of random numbers."""
        return [prompt.index for prompt in self.prompts]


def dataset_path(target: Target, dataset: str | Path) -> Path:
    """The file of prompts. Raises UserError for "heldout" without a run that left one."""
    if str(dataset) != HELDOUT:
        return Path(dataset)
    if target.run is None:
        raise UserError(
            f"--dataset heldout: '{target.name}' lies in no training run; name a JSONL file of prompts"
        )
    return target.run.heldout


def evenly_spaced(rows: Sequence[Item], count: int | None) -> list[Item]:
    """`count` rows from all over the file. Raises UserError where it has fewer."""
    count = min(NUM_SAMPLES, len(rows)) if count is None else count
    if count > len(rows):
        raise UserError(f"--num_samples {count}: the dataset has only {len(rows)} prompts; give {len(rows)}")
    return [rows[i * len(rows) // count] for i in range(count)]


def encode_prompts(target: Target, rows: Sequence[PromptRow]) -> list[Prompt]:
    """The rows' token ids. Raises UserError for a prompt that is no text."""
    return [Prompt(i, f"{row.source}:{row.line}", target.encode_row(row)) for i, row in enumerate(rows)]


def make_batches(
    target: Target, prompts: list[Prompt], size: int
) -> tuple[list[Batch], dict[int, UserError]]:
    """Batches of `size` neighbours (the last may have fewer), and the prompts that no batch can take.

    A prompt that cannot be decoded at all, being longer than the context, say, would take its batch down with
    it. It is left out beforehand, with what is wrong with it, by index.

    Raises UserError where there are fewer prompts than a batch has room for: that batch size would not be what
    is measured.
    """
    if size > len(prompts):
        raise UserError(
            f"--batch_size {size}: there are only {len(prompts)} prompts; give {len(prompts)} or less"
        )
    fitting, unfit = [], {}
    for prompt in prompts:
        try:
            check_prompt(target.runner, prompt.index, prompt.tokens)
        except UserError as error:
            unfit[prompt.index] = error
        else:
            fitting.append(prompt)
    starts = range(0, len(fitting), size)
    return [Batch(i, fitting[start : start + size]) for i, start in enumerate(starts)], unfit


def warm_up_prompt(target: Target, rows: list[PromptRow], chosen: list[PromptRow]) -> list[int]:
    """A prompt that is not among the chosen ones; half of one where all are.

    Raises UserError where no chosen prompt fits the model's context: there is nothing to measure.
    """
    room = target.runner.context_length - 1
    fitting = [tokens for row in chosen if len(tokens := target.encode_row(row)) <= room]
    if not fitting:
        raise UserError(
            f"no prompt of the dataset fits the model's context of {room + 1} tokens; give shorter ones"
        )
    lines = {row.line for row in chosen}
    for row in rows:
        if row.line not in lines and len(tokens := target.encode_row(row)) <= room:
            return tokens
    return fitting[0][: max(1, len(fitting[0]) // 2)]
