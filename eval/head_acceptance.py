"""How many drafts of heads a target's own text would accept, and which mistake explains it where these are few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eval.decoding.acceptance import Greedy
from eval.decoding.drafters.heads import HeadsDrafter
from eval.head_reading import HeadReader, Reading
from eval.prompts import HELDOUT, dataset_path, encode_prompts, evenly_spaced
from eval.target import Target
from eval.tree_ranks import MISSING, Text, continued, text_ranks
from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_prompts

SAMPLES = 16
TEXTS = 4  # that mistakes are tried on
FAR = 0.5  # of the drafts that are expected: with fewer something is wrong


@dataclass(frozen=True)
class Request:
    """Which texts acceptance is measured on. Raises UserError for impossible ones."""

    dataset: str = HELDOUT
    num_samples: int | None = None
    max_steps: int = 64

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise UserError(f"--num_samples {self.num_samples}: give 1 or more")
        if self.max_steps < 2:
            raise UserError(
                f"--max_steps {self.max_steps}: give 2 or more; drafts follow the first new token"
            )


class Explanation(NamedTuple):
    """With which mistake more drafts are accepted, and the acceptance lengths with it and without."""

    mistake: Reading
    length: float
    before: float


def own_texts(target: Target, request: Request) -> list[Text]:
    """Prompts with the target's greedy continuations. Raises UserError."""
    rows = read_prompts(dataset_path(target, request.dataset))
    number = min(SAMPLES, len(rows)) if request.num_samples is None else request.num_samples
    return continued(target, encode_prompts(target, evenly_spaced(rows, number)), request.max_steps)


def is_far(length: float, expected: float) -> bool:
    """Whether one acceptance length has far fewer drafts than another."""
    return length - 1.0 < FAR * (expected - 1.0)


def acceptance_length(hits: Sequence[Tensor]) -> float | None:
    """Tokens a forward by the chain of first choices, over all places that all steps have; None without such places."""
    rows = torch.cat(list(hits))
    whole = rows[(rows != MISSING).all(dim=1)]
    return 1.0 + float(whole.cumprod(dim=1).sum(dim=1).double().mean()) if len(whole) else None


def shares(hits: Sequence[Tensor]) -> list[float]:
    """How often each step is right."""
    columns = torch.cat(list(hits)).unbind(dim=1)
    return [float((one == 1).sum() / max(1, int((one != MISSING).sum()))) for one in columns]


def hits_of_heads(drafter: HeadsDrafter, text: Text) -> Tensor:
    """Where Medusa and Hydra heads are right: int64 [places, heads], 1 right, 0 wrong, MISSING beyond the text.

    Place i is where decoding may draft from, and column k is about the token `given` + i + k + 1.
    """
    ranks = text_ranks(drafter, text, Greedy())[:, 1:]
    return torch.where(ranks == MISSING, MISSING, (ranks == 0).long())


@torch.inference_mode()
def hits_of_eagle(reader: HeadReader, steps: int, reading: Reading, text: Text) -> Tensor:
    """The same of an EAGLE head that is told the text in that way, [places, steps]."""
    first = text.given - 1
    tokens = torch.tensor(text.tokens, device=reader.runner.device)
    found = torch.full((len(tokens) - text.given, steps), MISSING)
    for step, choices in enumerate(reader.choices(reading, tokens, steps)):
        right = (choices[first:] == tokens[step + 2 :][first:]).long()
        found[: len(right), step] = right.cpu()
    return found


def explanation(reader: HeadReader, steps: int, texts: Sequence[Text]) -> Explanation | None:
    """The mistake that makes the most of a head, if that is far more than without."""
    readings = [reader.right, *reader.mistakes()]
    hits = [[hits_of_eagle(reader, steps, one, text) for one in readings] for text in texts[:TEXTS]]
    before, *lengths = [acceptance_length(found) or 1.0 for found in zip(*hits, strict=True)]
    length, best = max(zip(lengths, reader.mistakes(), strict=True), key=lambda pair: pair[0])
    return Explanation(best, length, before) if is_far(before, length) else None
