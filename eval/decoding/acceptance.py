"""Rules: how a drafter's tokens are chosen, which path of a draft the target takes, and the token it adds.

Accepting does the one synchronisation with the host of a decoding step. The prefill is to a rule a draft that is
nothing but a root.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eval.decoding.shaping import Shaping
from eval.decoding.tree import Draft

if TYPE_CHECKING:
    from eval.decoding.drafters.base import State


@dataclass(frozen=True)
class Outcome:
    """What a verification decided, per row of the batch.

    Attributes:
        draft: what was verified.
        path: accepted nodes, the root first. Empty for a row that had already ended.
        tokens: the tokens won: those of the accepted drafts, then the target's own (the bonus).
        drafted: how many drafts were up for acceptance.
        logits: the target's logits of all nodes, [batch, n, vocab].
        states: layer -> the states that left it, [batch, n, hidden], for the layers that the drafter needs.
    """

    draft: Draft
    path: list[list[int]]
    tokens: list[list[int]]
    drafted: list[int]
    logits: Tensor
    states: dict[int, Tensor] = field(default_factory=dict)


class Rule(ABC):
    """How tokens are chosen, on both sides.

    Attributes:
        shaping: what is done to logits before; None for nothing.
    """

    shaping: Shaping | None

    def shaped(self, state: State, logits: Tensor, draft: Draft) -> Tensor:
        """What the rule looks at in place of the logits [batch, m, vocab] of a draft's last m nodes."""
        return logits if self.shaping is None else self.shaping.after_nodes(state, logits, draft)

    def preferences(self, state: State, logits: Tensor, draft: Draft) -> Tensor:
        """What a drafter should propose the best of, by its logits after a draft's last m nodes, [batch, m, vocab].

        For tokens that were not drawn: the better one is here, the likelier it is to be accepted.
        """
        return self.shaped(state, logits, draft)

    def first_choice(self, state: State, logits: Tensor, tokens: list[Tensor]) -> Tensor:
        """The token that it prefers after a chain `tokens`, [batch, 1] each, the root first: [batch, 1].

        logits [batch, 1, vocab] are the drafter's after the last of them. Must not wait for the device.
        """
        return self.preferences(state, logits, state.chain(torch.cat(tokens, dim=1))).argmax(dim=-1)

    def begin(self, state: State) -> None:  # noqa: B027
        """Before the prefill of a decode."""

    @abstractmethod
    def draft(self, state: State, logits: Tensor, tokens: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The next token of a chain after `tokens`, [batch, 1] each, the root first.

        logits [batch, 1, vocab] are the drafter's after the last of them. Returns the token [batch, 1] and the
        distribution it was drawn from, [batch, 1, vocab], or None where it was not drawn. Must not wait for
        the device.
        """

    @abstractmethod
    def accept(self, state: State, logits: Tensor, draft: Draft) -> Outcome:
        """Take a path of the draft by the target's logits [batch, n, vocab], and add a token of its own."""


class Greedy(Rule):
    """Always the most likely token, after a shaping of the logits if there is one."""

    def __init__(self, shaping: Shaping | None = None) -> None:
        self.shaping = shaping

    def draft(self, state: State, logits: Tensor, tokens: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The argmax."""
        if self.shaping is not None:
            logits = self.shaping.after_chain(state, logits, tokens)
        return logits.argmax(dim=-1), None

    def first_choice(self, state: State, logits: Tensor, tokens: list[Tensor]) -> Tensor:
        """The argmax."""
        return self.draft(state, logits, tokens)[0]

    def accept(self, state: State, logits: Tensor, draft: Draft) -> Outcome:
        """Accept the longest path on which every token is the target's argmax after its parent."""
        return follow(self.shaped(state, logits, draft).argmax(dim=-1), logits, draft)


def follow(choices: Tensor, logits: Tensor, draft: Draft) -> Outcome:
    """Accept the longest path on which every token is the target's choice after its parent.

    `choices` [batch, n]: what the target would say after each node, whatever was drafted there; -1 for nothing. The
    bonus is its choice after the last accepted node.
    """
    proposed = draft.tokens
    if not draft.is_complete:
        proposed = torch.where(draft.valid & draft.candidate, proposed, -2)  # no choice equals -2
    columns = [proposed, choices] if draft.is_chain else [proposed, choices, draft.parents]
    host = torch.stack(columns, dim=1).tolist()  # the step's one synchronisation
    chain = list(range(-1, draft.num_nodes - 1))
    outcome = Outcome(draft, [], [], [], logits)
    for tokens, chosen, *rest in host:
        parents = rest[0] if rest else chain
        agrees = [token == chosen[parent] for token, parent in zip(tokens, parents, strict=True)]
        path = longest_path(agrees, parents)
        outcome.path.append(path)
        outcome.tokens.append([chosen[node] for node in path])  # a child's token is its parent's choice
        outcome.drafted.append(sum(token >= 0 for token in tokens[1:]))
    return outcome


def longest_path(fits: Sequence[bool], parents: list[int], merit: Sequence[float] | None = None) -> list[int]:
    """The longest path from node 0 over nodes that fit; of several the one of most merit in all, then the first.

    What stands at node 0 and at nodes without a parent (-1) does not matter. Without `merit` all paths are alike.
    """
    reached = {0: (1, 0.0)}  # node -> the length and the merit of the path to it
    for node in range(1, len(parents)):
        if fits[node] and parents[node] in reached:
            length, so_far = reached[parents[node]]
            reached[node] = length + 1, so_far + (merit[node] if merit else 0.0)
    node = max(reached, key=reached.__getitem__)
    path = [node]
    while node != 0:
        node = parents[node]
        path.append(node)
    return path[::-1]
