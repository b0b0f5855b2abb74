"""Self-speculation: the first layers draft, the other layers verify (section 4.3 of arXiv 2404.16710).

Two things beyond the paper: drafts that stop when they are unlikely to be kept, and draft trees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from eval.decoding.drafters.base import Drafter, Range, State
from eval.decoding.drafters.confidence import Confidence, default_threshold
from eval.decoding.drafters.self_tree import SelfTree
from eval.decoding.tree import Draft
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner

OWNERS = {"stop_threshold": "draft_stop", "tree_top_k": "draft_tree", "tree_tokens": "draft_tree"}
TREE_TOP_K = 2
TREE_SPARE = 2  # kept beside as many drafts as a chain has


class SelfSpeculative(Drafter):
    """Drafts a chain, or a tree, with layers 0..E-1 and the LM head, over the target's own cache.

    The keys, values and exit states of the drafts are kept, so the verification enters at layer E and no
    layer runs twice for a token.
    """

    @dataclass(frozen=True)
    class Settings:
        """exit_layer: E, the layers that draft. num_speculations: d, the drafts a step, or a tree's depth.

        draft_stop: "confidence" ends a chain before d drafts where it has become unlikely that all of them are
        kept, below `stop_threshold` (by default see `default_threshold`); d may be generous then, such as 8.
        draft_tree: draft a tree. tree_top_k: the children of a node and the nodes of a level that get any, by
        default 2; tree_tokens: the drafts that are kept for verification, by default d + 2. The defaults are for a
        CPU, where every row costs time.
        """

        exit_layer: int
        num_speculations: int
        draft_stop: Literal["confidence"] | None = None
        stop_threshold: float | None = None
        draft_tree: bool = False
        tree_top_k: int | None = None
        tree_tokens: int | None = None

    def __init__(self, runner: Runner, settings: Settings) -> None:
        refuse_contradictions(settings)
        settings = in_force(settings, runner.num_layers)
        super().__init__(runner, settings)
        self.exit_layer = settings.exit_layer
        self.num_speculations = settings.num_speculations
        self.threshold = settings.stop_threshold
        self.draws = not settings.draft_tree
        self.max_nodes = settings.num_speculations + 1
        self.tree: SelfTree | None = None
        if settings.tree_top_k is not None and settings.tree_tokens is not None:
            width, count = settings.tree_top_k, settings.tree_tokens
            self.tree = SelfTree(runner, self.exit_layer, self.num_speculations, width, count)
            self.max_nodes = max(self.max_nodes, self.tree.max_nodes)

    @classmethod
    def ranges(cls, runner: Runner) -> dict[str, Range]:
        """Some layer has to be left for the verification."""
        return {
            "exit_layer": (1, runner.num_layers - 1),
            "num_speculations": (1, None),
            "stop_threshold": (0, 1),
            "tree_top_k": (1, runner.vocab_size),
            "tree_tokens": (1, None),
        }

    def propose(self, state: State) -> Draft:
        """Up to d drafts after each other, fewer near the end, with the states that leave layer E-1.

        With `draft_stop` it waits for the device once a draft.
        """
        drafts = state.chain_length(self.num_speculations)
        if self.tree is not None and drafts > 0:
            return self.tree.propose(state, drafts)
        confidence = None if self.threshold is None else Confidence(state, drafts, self.threshold)
        tokens = [state.last]  # [batch, 1] each
        exits: list[Tensor] = []  # [batch, 1, hidden] each
        q: list[Tensor] = []  # [batch, 1, vocab] each, if the drafts are drawn
        going = drafts > 0
        while len(exits) < len(tokens):  # nobody drafts from the last one: the target does
            context = state.chain_context(len(exits), 1)
            result = self.runner.forward(tokens[-1], 0, self.exit_layer, context, head=going)
            exits.append(result.hidden)
            if result.logits is not None:
                token, distribution = state.rule.draft(state, result.logits, tokens)
                tokens.append(token)
                if distribution is not None:
                    q.append(distribution)
                going = len(exits) < drafts
                if going and confidence is not None:
                    going = confidence.goes_on(result.logits, token, distribution)
        if self.runner.fixed_shapes:
            missing = drafts + 1 - len(exits)
            for parts in (tokens, exits, q):
                parts += parts[-1:] * missing
        return state.chain(
            torch.cat(tokens, dim=1),
            entry_layer=self.exit_layer,
            hidden=torch.cat(exits, dim=1),
            q=torch.cat(q, dim=1) if q else None,
            drafted=None if confidence is None else confidence.drafted(len(tokens) - 1),
        )


def in_force(settings: SelfSpeculative.Settings, num_layers: int) -> SelfSpeculative.Settings:
    """The settings with the defaults of what was asked for filled in, as a report shows them."""
    found: dict[str, Any] = {}
    if settings.draft_stop is not None:
        found["stop_threshold"] = default_threshold(settings.exit_layer, num_layers)
    if settings.draft_tree:
        found |= {"tree_top_k": TREE_TOP_K, "tree_tokens": settings.num_speculations + TREE_SPARE}
    missing = {name: value for name, value in found.items() if getattr(settings, name) is None}
    return replace(settings, **missing)


def refuse_contradictions(settings: SelfSpeculative.Settings) -> None:
    """Raises UserError for settings that belong to what was not asked for, or to two things at once."""
    for name, owner in OWNERS.items():
        value = getattr(settings, name)
        if value is not None and not getattr(settings, owner):
            wanted = {"draft_stop": "draft_stop=confidence", "draft_tree": "draft_tree"}[owner]
            raise UserError(f"self_speculative: {name}={value} is for {wanted}; add that or leave {name} out")
    if settings.draft_tree and settings.draft_stop is not None:
        raise UserError(
            f"self_speculative: draft_stop={settings.draft_stop} is for chains and draft_tree drafts a tree; "
            "leave one of them out"
        )
