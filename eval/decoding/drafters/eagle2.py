"""EAGLE-2 and EAGLE-3: drafting over a tree that grows where the head is sure (arXiv 2406.16858, 2503.01840)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eval.decoding.acceptance import Outcome
from eval.decoding.drafters.base import Drafter, State
from eval.decoding.drafters.eagle import EagleDraft, HeadLayer, require_kind
from eval.decoding.drafters.self_tree import made_so_far
from eval.decoding.growing import Growing, Plan, Shape, along, likeliest
from eval.decoding.settings import Range
from eval.decoding.tree import Draft
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner


@dataclass(frozen=True)
class GrowthSettings:
    """draft: the head. num_speculations: levels. tree_top_k: children of a node, and nodes of a level that get any.

    tree_tokens: drafts that are verified. A tree_top_k of 1 drafts a chain. Defaults: what lies beside the head
    (`python -m eval tree`).
    """

    draft: EagleDraft
    num_speculations: int | None = None
    tree_top_k: int | None = None
    tree_tokens: int | None = None

    def shape(self, strategy: str) -> Shape:
        """What is asked for, the head's own for the rest. Raises UserError for more drafts than are proposed."""
        own = self.draft.growth
        depth = own.depth if self.num_speculations is None else self.num_speculations
        width = own.width if self.tree_top_k is None else self.tree_top_k
        proposed = width + (depth - 1) * width**2
        if self.tree_tokens is not None and self.tree_tokens > proposed:
            raise UserError(
                f"{strategy}: tree_tokens={self.tree_tokens} is more than the {proposed} drafts that "
                f"num_speculations={depth} and tree_top_k={width} propose; give {proposed} or less, or a larger tree"
            )
        if width == 1:
            depth = depth if self.tree_tokens is None else self.tree_tokens
            return Shape(depth, 1, depth)
        count = own.count if own.width > 1 else depth + SPARE
        return Shape(depth, width, self.tree_tokens or min(count, proposed))


SPARE = 2  # kept beside as many drafts as a chain has
HESITATION = 0.5
"""What a head's logits are divided by where its drafts are compared: it is less sure than it is right, for a greedy
target takes the likeliest token, however unlikely. Measured on an 8M model by trees of depth 5, width 3 and 12 drafts,
with 1, 0.5 and 0.35: 3.28, 3.81 and 3.92 tokens a step with EAGLE's head, 2.42, 2.46 and 2.32 with EAGLE-3's."""


class Eagle2(Drafter):
    """Expands the likeliest nodes level by level, and has the likeliest of all that were proposed verified.

    Its tokens are those that the head prefers as the rule does, when sampling by the noise of their places; any tree
    may be proposed to any rule, so sampling stays lossless.
    """

    Settings = GrowthSettings
    strategy = "eagle2"

    def __init__(self, runner: Runner, settings: GrowthSettings) -> None:
        require_kind(self.strategy, settings.draft)
        shape = settings.shape(self.strategy)
        settings = replace(
            settings, num_speculations=shape.depth, tree_top_k=shape.width, tree_tokens=shape.count
        )
        super().__init__(runner, settings)
        self.shape = shape
        self.layer = HeadLayer(settings.draft, runner)
        self.needs = self.layer.needs
        self.max_nodes = shape.count + 1
        self._plans: dict[int, Plan] = {}  # by depth
        refuse_too_much(self.strategy, shape, self.layer, runner)

    @classmethod
    def ranges(cls, runner: Runner) -> dict[str, Range]:
        """At least one draft."""
        return dict.fromkeys(("num_speculations", "tree_top_k", "tree_tokens"), (1, None))

    def start(self, state: State, prompts: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """See `HeadLayer.start`."""
        expanded = self.plan(self.shape.depth).expanded
        self.layer.start(state, prompts, hidden, max(expanded, self.shape.depth + 1))

    def advance(self, outcome: Outcome) -> None:
        """See `HeadLayer.advance`."""
        self.layer.advance(outcome)

    def propose(self, state: State) -> Draft:
        """The tree or chain, without its lower levels near the end."""
        depth = state.chain_length(self.shape.depth)
        if depth == 0:
            return state.chain(state.last)
        if self.shape.width == 1:
            return state.chain(self.layer.chain(state, depth))
        return self._tree(state, depth)

    def plan(self, depth: int) -> Plan:
        """Of a tree of that depth."""
        if depth not in self._plans:
            width, device = self.shape.width, self.runner.device
            proposed = width + (depth - 1) * width**2
            self._plans[depth] = Plan(depth, width, min(self.shape.count, proposed), device)
        return self._plans[depth]

    def _tree(self, state: State, depth: int) -> Draft:
        """Expand level by level, then keep the best."""
        growing = Growing(self.plan(depth), state.last)
        outputs = self.layer.root
        for level in range(1, depth + 1):
            if level > 1:
                first, stop = growing.first, growing.stop
                features = outputs.gather(1, along(growing.below, outputs.shape[2]))
                context = self.layer.state.tree_context(growing.level, growing.visible, first, stop)
                outputs = self.layer.run(growing.tokens[:, first:stop], features, context)
            preferences = state.rule.preferences(
                state, self.layer.logits(outputs), made_so_far(state, growing)
            )
            values, tokens = likeliest(preferences / HESITATION, self.shape.width)
            if min(state.room) <= level:  # some row ends before: its tree has nodes above only
                values = values.masked_fill(~state.has_room(level)[..., None], -torch.inf)
            growing.expand(values, tokens)
        return grown(state, growing)


class Eagle3(Eagle2):
    """The same with a head that was trained for the steps that it drafts."""

    strategy = "eagle3"


def grown(state: State, growing: Growing) -> Draft:
    """The best of all that was proposed, as a draft of which the target has seen nothing."""
    kept = growing.keep()
    nodes = kept.run  # [batch, 1 + count]
    count = nodes.shape[1]
    visible = growing.visible.gather(1, along(nodes, growing.visible.shape[2]))
    return Draft(
        tokens=growing.tokens.gather(1, nodes),
        parents=kept.parents,
        position=state.length + growing.level.gather(1, nodes),
        slot=state.length + torch.arange(count, device=nodes.device),
        valid=kept.possible,
        candidate=kept.possible,
        visible=visible.gather(2, along(nodes, count).mT),
        in_order=True,
    )


def refuse_too_much(strategy: str, shape: Shape, layer: HeadLayer, runner: Runner) -> None:
    """Raises UserError for a tree that no text of the model, or no vocabulary of the head, has room for."""
    wanted = {"num_speculations": shape.depth, "tree_tokens": shape.count}
    for name, value in wanted.items():
        if value >= runner.context_length:
            raise UserError(
                f"{strategy}: {name}={value} does not fit the model's context of {runner.context_length} tokens; "
                "give less"
            )
    if shape.width > layer.words:
        raise UserError(
            f"{strategy}: tree_top_k={shape.width} is more than the {layer.words} tokens of the head's vocabulary; "
            "give less"
        )
