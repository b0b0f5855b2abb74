"""A strategy of one's own in one file: drafts retrieved from a datastore of texts, as REST does (arXiv 2311.08252).

CONTRIBUTING.md goes through it line by line. `STRATEGIES["retrieval"] = Retrieval` makes it known by its name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eval.decoding.drafters.base import Drafter, Range, State
from eval.decoding.tree import Draft
from layerskip_model.runner import Runner


class Datastore:
    """Texts of token ids, and the places at which each n-gram of theirs, of up to `longest` tokens, ends."""

    def __init__(self, name: str, texts: Sequence[list[int]], longest: int = 4) -> None:
        self.name = name  # for the tables of a benchmark
        self.texts = texts
        self.longest = longest
        self.places: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, text in enumerate(texts):
            for end in range(1, len(text)):
                for begin in range(max(0, end - longest), end):
                    self.places[tuple(text[begin:end])].append((number, end))

    def continuations(self, text: list[int], count: int) -> list[tuple[int, ...]]:
        """Up to `count` tokens after each place where the longest known suffix of this text ends."""
        for begin in range(max(0, len(text) - self.longest), len(text)):
            places = self.places.get(tuple(text[begin:]))
            if places:
                return [tuple(self.texts[number][end : end + count]) for number, end in places]
        return []


class Retrieval(Drafter):
    """Drafts the continuations that are the most frequent in a datastore, as a tree of their common beginnings."""

    @dataclass(frozen=True)
    class Settings:
        """datastore: where to look. num_speculations: the tree's depth. tree_tokens: its drafts."""

        datastore: Datastore
        num_speculations: int = 6
        tree_tokens: int = 12

    def __init__(self, runner: Runner, settings: Settings) -> None:
        super().__init__(runner, settings)
        self.max_nodes = settings.tree_tokens + 1

    @classmethod
    def ranges(cls, runner: Runner) -> dict[str, Range]:
        """One token or more of each."""
        return {"num_speculations": (1, None), "tree_tokens": (1, None)}

    def propose(self, state: State) -> Draft:
        """The root with each row's tree; where rows differ in size, the others are padded."""
        trees = [self._tree(text, room) for text, room in zip(state.texts, state.room, strict=True)]
        nodes = max(map(len, trees))
        padded = [tree + [(0, -1, 0)] * (nodes - len(tree)) for tree in trees]
        tokens, parents, depth = torch.tensor(padded).to(state.length.device).unbind(2)  # [batch, nodes] each
        node = torch.arange(nodes, device=tokens.device)
        real = (parents >= 0) | (node == 0)
        return Draft(tokens, parents, state.length + depth, state.length + node, valid=real, candidate=real)

    def _tree(self, text: list[int], room: int) -> list[tuple[int, int, int]]:
        """Token, parent and depth of every node. A beginning is at least as frequent as what goes on from it."""
        depth = min(self.settings.num_speculations, room - 1)  # the target adds a token of its own
        found = self.settings.datastore.continuations(text, depth)
        counts = Counter(path[:end] for path in found for end in range(1, len(path) + 1))
        paths = [(), *(path for path, _ in counts.most_common(self.settings.tree_tokens))]
        number = {path: node for node, path in enumerate(paths)}
        return [(text[-1], -1, 0), *((path[-1], number[path[:-1]], len(path)) for path in paths[1:])]
