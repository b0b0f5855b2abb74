"""Which nodes a tree should have: those on whose paths the text goes on most often.

A node of a static tree is accepted exactly where the ranks of the tokens that follow begin with its path. So a tree's
expected acceptance length is 1 + the sum over its nodes of how often that is, and as no path is more frequent than its
parent, the n most frequent ones are the best tree of n nodes. Medusa's own trees (section 2.1.2 of arXiv 2401.10774)
take products of each head's accuracies for these frequencies, as if the heads were right independently.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from eval.decoding.static_tree import RanksPath
from eval.tree_ranks import MISSING, TOP

PRIOR = 32.0
"""places that each head's own accuracies count for, beside those where the path before has been seen"""


NEVER = 1 << 30  # nodes


class Frequencies:
    """How often the ranks of what follows begin with a path, estimated from ranks [places, heads] that were seen.

    The chance of a rank after a path is its share among the places where that path was right, taken together with PRIOR
    places that have the head's accuracies over all places: rare paths say little by themselves.
    """

    def __init__(self, ranks: Tensor, prior: float = PRIOR) -> None:
        whole = ranks[(ranks != MISSING).all(dim=1)]
        self.heads = ranks.shape[1]
        self.prior = prior
        self._seen: Counter[RanksPath] = Counter()
        for place in whole.tolist():
            for level in range(self.heads + 1):
                self._seen[tuple(place[:level])] += 1
                if level < self.heads and place[level] == TOP:
                    break
        shares = [torch.bincount(column, minlength=TOP + 1)[:TOP] for column in whole.T]
        self._accuracy = [(share.double() / max(1, len(whole))).tolist() for share in shares]

    def children(self, path: RanksPath) -> list[float]:
        """The chance of each rank 0..TOP-1 after a path that is right and not as long as there are heads."""
        seen = self._seen[path]
        weight = seen + self.prior
        return [
            (self._seen[*path, rank] + self.prior * share) / weight if weight else 0.0
            for rank, share in enumerate(self._accuracy[len(path)])
        ]

    def best(self, size: int, depth: int) -> list[RanksPath]:
        """The `size` most frequent paths of at most `depth` ranks, the most frequent first; parents before children."""
        found: list[RanksPath] = []
        waiting: list[tuple[float, RanksPath]] = [(-1.0, ())]
        while waiting and len(found) <= size:
            chance, path = heapq.heappop(waiting)
            found.append(path)
            if len(path) < depth:
                for rank, share in enumerate(self.children(path)):
                    if share > 0.0:
                        heapq.heappush(waiting, (chance * share, (*path, rank)))
        return found[1:]


def accepted_drafts(ranks: Tensor, paths: Sequence[RanksPath]) -> Tensor:
    """Where the first n of the paths are the tree: how many drafts are accepted at each place.

    ranks [places, heads] -> int64 [places, heads]: the smallest n whose tree reaches as deep as the column's number,
    NEVER where none does. So a tree of n nodes accepts as many drafts as the row has numbers of n or less.
    """
    needed = {path: nodes for nodes, path in enumerate(paths, start=1)}
    rows = [
        [needed.get(tuple(place[:level]), NEVER) for level in range(1, len(place) + 1)]
        for place in ranks.tolist()
    ]
    return torch.tensor(rows).reshape(ranks.shape)


def decoded(drafts: Sequence[int]) -> tuple[int, int]:
    """Tokens and steps of decoding a text of len(drafts) tokens, the first of which is the prefill's.

    drafts[i]: how many would be accepted where the draft follows token i. No step wins more than is left of the text,
    the target's own token included.
    """
    place, steps = 0, 0
    while place < len(drafts) - 1:
        place = min(place + 1 + drafts[place], len(drafts) - 1)
        steps += 1
    return place, steps
