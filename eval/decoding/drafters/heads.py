"""Drafting with heads that read the target's last hidden state: what Medusa and Hydra have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from eval.decoding.acceptance import Outcome
from eval.decoding.drafters.base import Drafter, State
from eval.decoding.settings import Range
from eval.decoding.static_tree import Layout, TreeShape
from eval.decoding.tree import Draft
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner


@dataclass(frozen=True)
class DraftHeads:
    """Heads that draft for a target, in its dtype and on its device. `name` is how the user called them.

    Attributes:
        number: how many heads there are, the deepest tree that they can draft.
        tree: what they draft when nothing else is asked for.
    """

    spoken: ClassVar[str] = "a directory of heads, or the run that trained them (--draft DIR)"

    name: str
    heads: nn.Module = field(repr=False)
    number: int
    tree: TreeShape = field(repr=False)


@dataclass(frozen=True)
class HeadSettings:
    """draft: the heads. tree: its shape; num_speculations, tree_tokens: its levels and its nodes, to draft less."""

    draft: DraftHeads
    tree: TreeShape | None = None
    num_speculations: int | None = None
    tree_tokens: int | None = None

    def in_force(self, strategy: str) -> Self:
        """The same with everything filled in. Raises UserError for more than the heads or the tree have."""
        tree = self.draft.tree if self.tree is None else self.tree
        if tree.depth > self.draft.number:
            raise UserError(
                f"{strategy}: tree '{tree.name}' has {tree.depth} levels and '{self.draft.name}' {self.draft.number} "
                f"heads; cut it to {self.draft.number}"
            )
        wanted = {"num_speculations": (tree.depth, "levels"), "tree_tokens": (tree.size, "nodes")}
        for name, (most, what) in wanted.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise UserError(
                    f"{strategy}: {name}={value} is more than the {most} {what} of tree '{tree.name}'; "
                    f"give {most} or less, or another tree"
                )
        tree = tree.cut(depth=self.num_speculations, size=self.tree_tokens)
        return replace(self, tree=tree, num_speculations=tree.depth, tree_tokens=tree.size)


class HeadsDrafter(Drafter):
    """Drafts a static tree, each level from the one above it.

    The heads read the state that the last emitted token was predicted from: that of the last accepted node.

    Tokens are those that a head prefers as the rule does, when sampling by the noise of their places; any tree may be
    proposed to any rule, so sampling stays lossless.
    """

    Settings: ClassVar[type[Any]] = HeadSettings

    def __init__(self, runner: Runner, settings: HeadSettings) -> None:
        strategy = type(self).__name__.lower()
        settings = settings.in_force(strategy)
        super().__init__(runner, settings)
        assert settings.tree is not None
        name, ranks = settings.tree.name, settings.tree.width
        if ranks > runner.vocab_size:
            raise UserError(
                f"{strategy}: tree '{name}' has rank {ranks - 1} and the model's vocabulary {runner.vocab_size} "
                "tokens; give ranks below that"
            )
        self.layout = Layout(settings.tree, runner.device)
        self.max_nodes = settings.tree.size + 1
        self._last_layer = runner.num_layers - 1
        self.needs = (self._last_layer,)

    @classmethod
    def ranges(cls, runner: Runner) -> dict[str, Range]:
        """At least one draft."""
        return {"num_speculations": (1, None), "tree_tokens": (1, None)}

    def start(self, state: State, prompts: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """Take the state of each prompt's last token."""
        self.hidden = self._states(hidden, [len(prompt) - 1 for prompt in prompts])

    def advance(self, outcome: Outcome) -> None:
        """Take the state of the last accepted node."""
        self.hidden = self._states(outcome.states, [path[-1] if path else 0 for path in outcome.path])

    def propose(self, state: State) -> Draft:
        """The tree, without its lower levels near the end."""
        depth = state.chain_length(self.layout.depth)
        return self.tree(state, self.draft(state, depth) if depth else state.last, depth)

    def tree(self, state: State, tokens: Tensor, depth: int) -> Draft:
        """The draft of all nodes down to that level, tokens [batch, layout.nodes(depth)]."""
        layout, n = self.layout, tokens.shape[1]
        if depth == 0 or layout.shape.is_chain:
            return state.chain(tokens)
        parents, level, visible = layout.parents[:, :n], layout.level[:, :n], layout.visible[:, :n, :n]
        return state.tree(tokens, parents, level, visible, depth)

    @abstractmethod
    def draft(self, state: State, depth: int) -> Tensor:
        """The tokens of all nodes down to that level, 1 or more, root included: [batch, layout.nodes(depth)].

        `self.hidden` [batch, 1, hidden] is the state to draft from, after the final norm.
        """

    @abstractmethod
    def along(self, hidden: Tensor, tokens: Tensor, first: int) -> Iterator[Tensor]:
        """What each head says along a given text, whose own tokens stand before each guess.

        Head `index` (0, 1, ...) reads the state at a place t, in `hidden` [seq, hidden] after the final norm, and
        guesses the token at t + 2 + index of `tokens` [seq]. Yields each head's logits at the places from `first` on
        whose guess is in the text, [seq - 2 - index - first, vocab], none where there is no such place.
        """

    def _states(self, states: dict[int, Tensor], nodes: list[int]) -> Tensor:
        """The final state of one node of each row, [batch, 1, hidden]."""
        found = states[self._last_layer]
        row = torch.arange(len(nodes), device=found.device)
        return self.runner.normed(found[row, torch.tensor(nodes, device=found.device)][:, None])
