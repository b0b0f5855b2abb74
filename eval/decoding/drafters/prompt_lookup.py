"""Prompt lookup: drafts are copied from an earlier place of the text that ends alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.decoding.drafters.base import Drafter, Range, State
from eval.decoding.tree import Draft
from layerskip_model.runner import Runner


class PromptLookup(Drafter):
    """Drafts what followed the longest suffix of a row's text (up to `max_ngram` tokens) that occurred before.

    No model drafts, and nothing is drawn. Rows whose last token is new get no drafts.
    """

    @dataclass(frozen=True)
    class Settings:
        """max_ngram: the longest suffix to look for. num_speculations: the drafts a step."""

        max_ngram: int = 3
        num_speculations: int = 10

    def __init__(self, runner: Runner, settings: Settings) -> None:
        super().__init__(runner, settings)
        self.max_ngram = settings.max_ngram
        self.num_speculations = settings.num_speculations
        self.max_nodes = settings.num_speculations + 1

    @classmethod
    def ranges(cls, runner: Runner) -> dict[str, Range]:
        """One token or more of each."""
        return {"max_ngram": (1, None), "num_speculations": (1, None)}

    def start(self, state: State, prompts: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """Index the prompts."""
        self._indexes = [NgramIndex(self.max_ngram) for _ in prompts]
        for index, text in zip(self._indexes, state.texts, strict=True):
            index.extend(text)

    def propose(self, state: State) -> Draft:
        """The root alone, or with `num_speculations` drafts for the rows that found some (fewer near the end)."""
        count = state.chain_length(self.num_speculations)
        found = [
            [] if ended else index.continuation(text, count)
            for index, text, ended in zip(self._indexes, state.texts, state.finished, strict=True)
        ]
        if not any(found):
            return state.chain(state.last)
        rows = [
            [len(drafts), text[-1], *drafts, *[0] * (count - len(drafts))]
            for drafts, text in zip(found, state.texts, strict=True)
        ]
        host = torch.tensor(rows).to(self.runner.device)  # [batch, 1 + nodes], in one transfer
        return state.chain(host[:, 1:], drafted=None if all(found) else host[:, :1])


class NgramIndex:
    """Where each n-gram of a growing text, of 1..longest tokens, occurred last."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._follower: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its last occurrence
        self._ends = 1  # n-grams that end before this place are known

    def extend(self, text: Sequence[int]) -> None:
        """Learn the n-grams that end before the text does: the last ones are what is looked for."""
        for end in range(self._ends, len(text)):
            for begin in range(max(0, end - self.longest), end):
                self._follower[tuple(text[begin:end])] = end
        self._ends = max(self._ends, len(text))

    def continuation(self, text: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that followed the longest known suffix of the text; none where no token is known.

        Where they run into the end of the text they go on with themselves, as a copy in LZ77 does: a loop is
        drafted round and round.
        """
        self.extend(text)
        for begin in range(max(0, len(text) - self.longest), len(text)):
            place = self._follower.get(tuple(text[begin:]))
            if place is not None:
                period = len(text) - place
                return [text[place + ahead % period] for ahead in range(count)]
        return []
