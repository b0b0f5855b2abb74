"""Self-speculation with a tree: the first layers draft a dynamic tree, the other layers verify it in one pass.

The tree grows as in EAGLE-2 (`eval.decoding.growing`), with the exit layer as the draft model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.decoding.drafters.base import State
from eval.decoding.drafters.confidence import DISAGREEMENT
from eval.decoding.growing import Growing, Plan, along, likeliest
from eval.decoding.tree import Draft
from layerskip_model.runner import Runner


class SelfTree:
    """Grows trees with layers 0..E-1 and the LM head, over the target's own cache.

    A level is one pass of its expanded nodes; what is kept without having been expanded follows in one pass
    without the head. So each node runs through the first layers once, and the verification enters at layer E. Of those
    layers the keys and values of what is kept are moved together: the others then know of no gaps.

    Its tokens are not drawn from a distribution that the rule is told of: they are those that the exit prefers as
    the rule does, when sampling by the noise of their places. Any tree may be proposed to any rule, so sampling stays
    lossless.
    """

    def __init__(self, runner: Runner, exit_layer: int, depth: int, width: int, count: int) -> None:
        self.runner = runner
        self.exit_layer = exit_layer
        self._width = width
        self._count = count
        self._plans: dict[int, Plan] = {}  # by depth
        self.max_nodes = self._plan(depth).span

    def propose(self, state: State, depth: int) -> Draft:
        """The tree of so many levels, at least one."""
        growing = Growing(self._plan(depth), state.last)
        exits = []  # [batch, nodes of a level, hidden] each
        for level in range(1, depth + 1):
            draft = made_so_far(state, growing)
            hidden, logits = self._run(state, growing, draft, head=True)
            assert logits is not None
            exits.append(hidden)
            preferences = state.rule.preferences(state, logits, draft)
            values, tokens = likeliest(preferences / DISAGREEMENT, self._width)
            if min(state.room) <= level:  # some row ends before: its tree has nodes above only
                values = values.masked_fill(~state.has_room(level)[..., None], -torch.inf)
            growing.expand(values, tokens)
        kept = growing.keep()
        made = made_so_far(state, growing)
        if growing.plan.fresh:
            exits.append(self._run(state, growing, made, head=False)[0])
        nodes = kept.run
        assert made.visible is not None
        draft = Draft(
            tokens=made.tokens.gather(1, nodes),
            parents=kept.parents,
            position=made.position.gather(1, nodes),
            slot=made.slot.gather(1, nodes),
            valid=kept.possible,
            candidate=kept.possible,
            entry_layer=self.exit_layer,
            hidden=torch.cat(exits, dim=1).gather(1, along(nodes, exits[0].shape[2])),
            visible=made.visible.gather(1, along(nodes, made.num_nodes)).gather(
                2, along(nodes, nodes.shape[1]).mT
            ),
            made=made.num_nodes,
        )
        return state.packed(draft)

    def _plan(self, depth: int) -> Plan:
        if depth not in self._plans:
            proposed = self._width + (depth - 1) * self._width**2
            self._plans[depth] = Plan(depth, self._width, min(self._count, proposed), self.runner.device)
        return self._plans[depth]

    def _run(
        self, state: State, growing: Growing, draft: Draft, *, head: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The next nodes through the first layers: what leaves those, and logits if wanted."""
        first, stop = growing.first, growing.stop
        context = state.context(draft, first, stop)
        result = self.runner.forward(draft.tokens[:, first:stop], 0, self.exit_layer, context, head=head)
        return result.hidden, result.logits


def made_so_far(state: State, growing: Growing) -> Draft:
    """The nodes that have been run and those that are next, each in the slot of its turn."""
    count, plan = growing.stop, growing.plan
    position = state.length + growing.level[:, :count]
    everything = plan.everything[:, :count].expand_as(position)
    return Draft(
        tokens=growing.tokens[:, :count],
        parents=growing.parents[:, :count],
        position=position,
        slot=state.length + plan.order[:, :count],
        valid=everything,
        candidate=everything,
        visible=growing.visible[:, :count, :count],
        in_order=True,
    )
