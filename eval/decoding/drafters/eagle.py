"""EAGLE: one decoder layer that drafts from the target's features, level by level (arXiv 2401.15077).

A place t of the layer is made of the features of t and the token at t + 1, and says what the token at t + 2 may be.
So the layer's last committed place is that of the token before the root of a draft, made with the root: where drafts
grow from. Below it, what left the layer at a node's parent stands for the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from eval.decoding.acceptance import Outcome
from eval.decoding.draft_layer import LayerState, draft_layer_runner
from eval.decoding.drafters.base import State
from eval.decoding.drafters.heads import DraftHeads, HeadsDrafter, HeadSettings
from eval.decoding.growing import Shape
from eval.decoding.static_tree import TreeShape
from layerskip_model.context import Context
from layerskip_model.eagle import EagleHead, unrolled
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.errors import UserError
from layerskip_model.fused_head import FusedHead
from layerskip_model.layer_runner import LayerRunner
from layerskip_model.runner import Runner

LEVELS = 10  # of the deepest static tree: what such heads say further on is hardly ever right


@dataclass(frozen=True)
class EagleDraft(DraftHeads):
    """An EAGLE or EAGLE-3 head.

    Attributes:
        layer: what runs its decoder layer.
        growth: the dynamic tree, or chain, that it drafts when nothing else is asked for.
    """

    spoken: ClassVar[str] = "a directory of an EAGLE head, or the run that trained it (--draft DIR)"

    heads: EagleHead | Eagle3Head
    layer: LayerRunner = field(repr=False)
    growth: Shape = field(repr=False)

    @classmethod
    def of(
        cls,
        name: str,
        head: EagleHead | Eagle3Head,
        runner: Runner,
        *,
        tree: TreeShape,
        growth: Shape,
        number: int = LEVELS,
    ) -> Self:
        """A head for that runner's model. Raises UserError where its layer cannot be decoded with."""
        return cls(name, head, number, tree, draft_layer_runner(runner, head.layer), growth)


class HeadLayer:
    """A head's layer and the cache that it runs over, beside the target's.

    Attributes:
        needs: the target's layers whose outgoing states are the head's features.
        root: what left the layer at its last committed place, [batch, 1, hidden].
        state: the cache. A draft's root is in it already, at the place that is committed next.
    """

    def __init__(self, draft: EagleDraft, runner: Runner) -> None:
        self.head = draft.heads
        self.runner = runner
        self._layer = draft.layer
        self._maps = self.head if draft.layer.fused is None else FusedHead(self.head, runner.backbone)
        self._vocabulary: Tensor | None = None
        if isinstance(self.head, Eagle3Head):
            self.needs = tuple(layer - 1 for layer in self.head.reads)
            if not self.head.vocabulary.is_whole:
                self._vocabulary = self.head.vocabulary.tokens()
        else:
            self.needs = (runner.num_layers - 1,)

    def start(self, state: State, prompts: list[list[int]], hidden: dict[int, Tensor], nodes: int) -> None:
        """Run the prompts, each token with the one after it, the root after the last one.

        `nodes`: at most so many are run after what is committed, the root among them.
        """
        self.state = LayerState(self._layer, state, nodes)
        after = [text[1 : len(prompt) + 1] for text, prompt in zip(state.texts, prompts, strict=True)]
        self._commit(hidden, after, None)

    def advance(self, outcome: Outcome) -> None:
        """Run what was accepted, with the target's own features this time."""
        self._commit(outcome.states, outcome.tokens, outcome.path)

    def _commit(
        self, states: dict[int, Tensor], after: list[list[int]], path: list[list[int]] | None
    ) -> None:
        """Run places of which the features are known: those of `path` in `states`, by default the first ones.

        `after`: each row's tokens after these places.
        """
        counts = list(map(len, after))
        longest = max(counts)
        # One transfer: each row's tokens, its nodes, and where its last one is; a row that had ended has none.
        rows = [padded(tokens, longest) for tokens in after]
        if path is not None:
            rows = [tokens + padded(nodes, longest) for tokens, nodes in zip(rows, path, strict=True)]
        columns = torch.tensor([[*row, max(0, n - 1)] for row, n in zip(rows, counts, strict=True)])
        columns = columns.to(self.runner.device)
        row = torch.arange(len(after), device=columns.device)[:, None]
        if path is not None:
            nodes = columns[:, longest:-1]
            states = {layer: states[layer].to(row.device)[row, nodes] for layer in self.needs}
        inputs = self._maps.inputs(self.runner.embed(columns[:, :longest]), self.features(states))
        outputs = self.state.extend(inputs, counts, with_root=True)  # [batch, longest, hidden]
        self.root = outputs[row, columns[:, -1:]]

    def features(self, states: dict[int, Tensor]) -> Tensor:
        """The head's features, from the states that left the layers of `needs`, [..., hidden]."""
        device = self.runner.device  # parts of the target may lie on others
        if isinstance(self.head, Eagle3Head):
            return self.head.features([states[layer].to(device) for layer in self.needs])
        return self.runner.normed(states[self.needs[0]]).to(device)

    def run(self, tokens: Tensor, features: Tensor, context: Context) -> Tensor:
        """A level of a draft: tokens [batch, n], and what left the layer at their parents -> [batch, n, hidden]."""
        inputs = self._maps.inputs(self.runner.embed(tokens), features)
        return self.state.runner.run(inputs, 0, 1, context)

    def chain(self, state: State, depth: int) -> Tensor:
        """First choices, one after another: tokens [batch, depth + 1], the root first."""
        tokens, outputs = [state.last], self.root
        for level in range(depth):
            if level:
                outputs = self.run(tokens[-1], outputs, self.state.chain_context(level, 1))
            tokens.append(state.rule.first_choice(state, self.logits(outputs), tokens))
        return torch.cat(tokens, dim=1)

    @property
    def words(self) -> int:
        """How many tokens the head can say."""
        return self.runner.vocab_size if self._vocabulary is None else len(self._vocabulary)

    def logits(self, outputs: Tensor) -> Tensor:
        """What follows, by what left the layer [..., hidden]: over the target's vocabulary, [..., vocab]."""
        logits = self._maps.logits(outputs).to(self.runner.device)
        if self._vocabulary is None:
            return logits
        found = logits.new_full((*logits.shape[:-1], self.runner.vocab_size), -torch.inf)
        return found.index_copy_(-1, self._vocabulary, logits)


class Eagle(HeadsDrafter):
    """A static tree: the nodes of a level that have children go through the layer together."""

    @dataclass(frozen=True)
    class Settings(HeadSettings):
        """See `HeadSettings`."""

        draft: EagleDraft

    def __init__(self, runner: Runner, settings: Settings) -> None:
        require_kind("eagle", settings.draft)
        super().__init__(runner, settings)
        self.layer = HeadLayer(settings.draft, runner)
        self.needs = self.layer.needs
        nodes = self.layout.inner_nodes
        self._level = self.layout.level[:, nodes]
        self._visible = self.layout.visible[:, nodes[:, None], nodes]

    def start(self, state: State, prompts: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """See `HeadLayer.start`."""
        self.layer.start(state, prompts, hidden, self.max_nodes)

    def advance(self, outcome: Outcome) -> None:
        """See `HeadLayer.advance`."""
        self.layer.advance(outcome)

    def draft(self, state: State, depth: int) -> Tensor:
        """See `HeadsDrafter.draft`. The layer's own nodes are those with children, in order."""
        layout, tokens, outputs = self.layout, state.last, self.layer.root
        if layout.shape.is_chain:
            return self.layer.chain(state, depth)
        made = [outputs]
        for level in range(depth):
            if level:
                first, stop = layout.inner_first[level], layout.inner_first[level] + layout.inner[level]
                features = torch.cat(made, dim=1)[:, layout.inner_parents[first:stop]]
                nodes = layout.inner_nodes[first:stop]
                context = self.layer.state.tree_context(self._level, self._visible, first, stop)
                outputs = self.layer.run(tokens[:, nodes], features, context)
                made.append(outputs)
            so_far = self.tree(state, tokens, level)
            preferences = state.rule.preferences(state, self.layer.logits(outputs), so_far)
            tokens = torch.cat([tokens, layout.children(level, preferences)], dim=1)
        return tokens

    def along(self, hidden: Tensor, tokens: Tensor, first: int) -> Iterator[Tensor]:
        """See `HeadsDrafter.along`. Each guess is told the text's own tokens before it, as if all drafts were right."""
        head: EagleHead = self.settings.draft.heads
        embedded = self.runner.embed(tokens[None, 1:])
        steps = unrolled(head, embedded, hidden[None, :-1], None, self.settings.draft.number)
        for index, output in enumerate(steps):
            yield self.layer.logits(output[0, first : max(first, len(tokens) - 2 - index)])


def require_kind(strategy: str, draft: EagleDraft) -> None:
    """Raises UserError for an EAGLE-3 head in another strategy than `eagle3`, and for an EAGLE head in that one."""
    is_third = isinstance(draft.heads, Eagle3Head)
    if is_third != (strategy == "eagle3"):
        kind, fix = ("EAGLE-3", "eagle3") if is_third else ("EAGLE", "eagle2, or eagle for a static tree")
        raise UserError(f"{strategy}: '{draft.name}' is an {kind} head; use {fix}")


def padded(tokens: list[int], length: int) -> list[int]:
    """With zeros at the end."""
    return tokens + [0] * (length - len(tokens))
