"""Dynamic trees: which depth, width and number of nodes, by what would have been drafted after every token of texts.

Levels are proposed one after another, and whatever is proposed has its score then. So the tree of eight levels with all
its nodes, the best first, tells of every shallower and every smaller one what it would have been: for each width the
texts are decoded once, by plain decoding that is asked for its draft after every token and never gets any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eval.decoding.acceptance import Outcome, Rule
from eval.decoding.drafters.base import Drafter, State
from eval.decoding.growing import Shape
from eval.decoding.speculate import decode
from eval.decoding.tree import Draft
from eval.target import Target
from eval.tree_costs import sizes_to_measure
from eval.tree_ranks import TOGETHER, Text, with_bar
from eval.tree_shapes import NEVER, decoded

WIDTHS = (1, 2, 3, 4, 6, 10)
LEVELS = 8
KEPT = 256
"""Nodes of a tree that are noted. A node beyond them is of no use to a tree of a few levels and dozens of nodes."""
TOKENS = 64  # of a text that are decoded

Make = Callable[[Shape], Drafter]


def trees_of(width: int, most: int) -> list[list[Shape]]:
    """The trees of that width and up to so many nodes that are looked at, depth by depth; of 1 it has the chains."""
    if width == 1:
        return [[Shape(depth, 1, depth)] for depth in range(1, min(LEVELS, most) + 1)]
    sizes = sizes_to_measure(most)
    found = [
        [shape for size in sizes if depth < size <= (shape := Shape(depth, width, size)).proposed]
        for depth in range(1, LEVELS + 1)
    ]
    return [trees for trees in found if trees]


def to_measure(groups: Sequence[Sequence[Shape]]) -> list[Shape]:
    """Of trees by depth those whose steps are timed: one of each, and the sizes shared among them."""
    return [trees[number % len(trees)] for number, trees in enumerate(groups)]


def growth_length(needed: Sequence[Tensor], shape: Shape) -> float:
    """The acceptance length of decoding texts with trees of that depth and number of nodes, by `watch`."""
    counts = [decoded((one[:, shape.depth - 1] <= shape.size).sum(dim=1).tolist()) for one in needed]
    return sum(tokens for tokens, _ in counts) / max(1, sum(steps for _, steps in counts))


def watch(target: Target, make: Make, width: int, texts: Sequence[Text], rule: Rule) -> list[Tensor]:
    """What trees of that width need to be right after every token of the texts.

    For each text, [places, LEVELS, LEVELS]: how many nodes a tree of d + 1 levels must have, so that its draft after
    that place is right for l + 1 tokens; NEVER where no number is enough.
    """
    size = TOGETHER if target.runner.takes_masks else 1
    deepest = Shape(LEVELS, width, KEPT)
    count = min(deepest.proposed, KEPT, target.runner.context_length - 1)
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    found: list[Tensor] = []
    for batch in with_bar(batches, f"drafting, {width} wide"):
        watcher = _Watcher(make(replace(deepest, count=count)))
        rows = decode(
            target.runner,
            watcher,
            [text.prompt for text in batch],
            max_new_tokens=min(TOKENS, max(len(text.new) for text in batch)),
            eos_token_ids=target.eos_token_ids,
            rule=rule,
            streams=[text.stream for text in batch],
        )
        said = [row.tokens for row in rows]
        places = [needed_nodes(draft, futures(said, 1 + place)) for place, draft in enumerate(watcher.drafts)]
        after_last = torch.full((1, LEVELS, LEVELS), NEVER)
        for row, tokens in enumerate(said):
            own = [place[row] for place in places[: len(tokens) - 1]]
            found.append(torch.cat([torch.stack(own), after_last]) if own else after_last)
    return found


class _Watcher(Drafter):
    """Drafts nothing, and notes what another would have drafted after every token."""

    def __init__(self, watched: Drafter) -> None:
        super().__init__(watched.runner, watched.settings)
        self.needs, self.max_nodes = watched.needs, watched.max_nodes
        self.drafts: list[Draft] = []
        self._watched = watched

    def start(self, state: State, prompts: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """The other's."""
        self._watched.start(state, prompts, hidden)

    def propose(self, state: State) -> Draft:
        """The root alone."""
        self.drafts.append(self._watched.propose(state))
        return state.chain(state.last)

    def advance(self, outcome: Outcome) -> None:
        """The other's."""
        self._watched.advance(outcome)


def futures(texts: Sequence[list[int]], first: int) -> Tensor:
    """The LEVELS tokens of each text from `first` on, [texts, LEVELS]; -1 where there is none."""
    return torch.tensor([(text[first : first + LEVELS] + [-1] * LEVELS)[:LEVELS] for text in texts])


def needed_nodes(draft: Draft, future: Tensor) -> Tensor:
    """How many nodes of a tree, the likeliest first, are needed to be right, see `watch`.

    future [batch, LEVELS] -> [batch, LEVELS, LEVELS].
    """
    tokens, parents, valid = draft.tokens.cpu(), draft.parents.cpu(), draft.valid.cpu()
    level = (draft.position - draft.position[:, :1]).cpu()
    depths = torch.arange(1, LEVELS + 1)[:, None]
    # Among the nodes of d levels, which one each node is.
    number = ((level[:, None] > 0) & (level[:, None] <= depths)).cumsum(dim=2)  # [batch, depths, nodes]
    node = torch.zeros(len(tokens), 1, dtype=torch.int64)
    is_right = torch.ones(len(tokens), dtype=torch.bool)
    found = torch.full((len(tokens), LEVELS, LEVELS), NEVER)
    for reached in range(1, LEVELS + 1):
        fits = valid & (level == reached) & (parents == node) & (tokens == future[:, reached - 1 : reached])
        is_right = is_right & fits.any(dim=1)
        node = fits.int().argmax(dim=1, keepdim=True)
        nodes = number.gather(2, node[:, None].expand(-1, LEVELS, -1))[..., 0]  # [batch, depths]
        fit = is_right[:, None] & (depths[:, 0] >= reached)
        found[:, :, reached - 1] = torch.where(fit, nodes, NEVER)
    return found
