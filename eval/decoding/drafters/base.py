"""The contract of a drafter, and the state of a decode that it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from eval.decoding.acceptance import Outcome, Rule
from eval.decoding.cache import SlotView, SpanView
from eval.decoding.capture import new_cache
from eval.decoding.settings import Range
from eval.decoding.tree import Draft, after_prefix, ancestor_mask, by_slot
from layerskip_model.context import Context
from layerskip_model.layer_runner import LayerRunner
from layerskip_model.runner import Runner


class State:
    """Where a decode stands: the cache, and per row of the batch the last token and what it may still emit.

    A drafter reads it, makes contexts for its own passes with it, and never changes it.

    Attributes:
        rule: chooses the tokens, a drafter's too.
        streams: each row's stream of random numbers, for a rule that draws.
        texts: each row's prompt and what was emitted after it.
        prompt_lengths: how much of each text is the prompt.
        horizon: the longest that any text can become.
        length: committed tokens, on the device, [batch, 1].
        last: the last emitted token, the root of the next draft, [batch, 1].
        room: how many more tokens a row may emit.
        finished: rows that have ended; they stay in the batch and nothing of theirs is kept.
    """

    def __init__(
        self,
        runner: LayerRunner,
        prompts: Sequence[list[int]],
        horizon: int,
        max_nodes: int,
        rule: Rule,
        streams: Sequence[int] | None = None,
    ) -> None:
        """Make room for texts of `horizon` tokens, prompt included, and for `max_nodes` nodes after them."""
        batch = len(prompts)
        self.runner = runner
        self.rule = rule
        self.streams = list(range(batch)) if streams is None else list(streams)
        self.texts = [list(prompt) for prompt in prompts]
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.batch = batch
        self.horizon = horizon
        self.cache = new_cache(runner, batch, horizon + max_nodes)
        self.tables = runner.tables(horizon, self.cache.capacity)
        self._row = torch.arange(batch, device=runner.device)[:, None]
        self._nodes = torch.arange(-1, max_nodes, device=runner.device)[None]
        self._true = torch.ones((1, max_nodes), dtype=torch.bool, device=runner.device)
        self.begin_step([0] * batch, [1] * batch, [False] * batch)

    @property
    def lengths(self) -> list[int]:
        """Committed tokens per row: those in the cache, the last token not among them."""
        return self.cache.lengths

    def begin_step(self, last: list[int], room: list[int], finished: list[bool]) -> None:
        """Take over each row's last token, room and end, and bring them to the device in one transfer."""
        columns = torch.tensor([last, self.lengths, room]).to(self.runner.device)[..., None]
        self.last, self.length, self._room = columns  # [batch, 1] each
        self.room = room
        self.finished = finished
        self._start = self.common_length()  # where there is one (always so for one row) slots are slices

    def common_length(self) -> int | None:
        """The committed length, where all rows have the same."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    def chain_length(self, wanted: int) -> int:
        """How many drafts, at most `wanted`, the roomiest row can take beside the target's own token.

        As many as wanted where shapes are fixed: what no row has room for is padding.
        """
        if self.runner.fixed_shapes:
            return wanted
        return min(wanted, max(self._rooms()) - 1)

    def chain(
        self,
        tokens: Tensor,
        entry_layer: int = 0,
        hidden: Tensor | None = None,
        q: Tensor | None = None,
        drafted: Tensor | None = None,
    ) -> Draft:
        """The chain of these tokens [batch, n], the first of which is the root.

        `drafted` [batch, 1]: how many of them, beside the root, are drafts where rows differ; the others are padding.
        """
        n = tokens.shape[1]
        shape = (self.batch, n)
        true = self._true[:, :n].expand(shape)
        is_complete = min(self._rooms()) >= n and drafted is None
        limit = self._room if drafted is None else torch.minimum(self._room, drafted + 1)
        position = self.length + self._nodes[:, 1 : n + 1]
        return Draft(
            tokens=tokens,
            parents=self._nodes[:, :n].expand(shape),
            position=position,
            slot=position,
            valid=true if is_complete else self._nodes[:, 1 : n + 1] < limit,
            candidate=true,
            entry_layer=entry_layer,
            hidden=hidden,
            q=q,
            in_order=True,
            is_chain=True,
            is_complete=is_complete,
        )

    def tree(self, tokens: Tensor, parents: Tensor, level: Tensor, visible: Tensor, depth: int) -> Draft:
        """The tree of these tokens [batch, n], in order, the root first and no node more than `depth` below it.

        `parents` and `level`, how far each node is below the root, [batch or 1, n]; `visible` [batch or 1, n, n].
        """
        shape = tokens.shape
        n = shape[1]
        is_complete = min(self._rooms()) > depth
        true = self._true[:, :n].expand(shape)
        return Draft(
            tokens=tokens,
            parents=parents.expand(shape),
            position=self.length + level,
            slot=self.length + self._nodes[:, 1 : n + 1],
            valid=true if is_complete else self.has_room(level),
            candidate=true,
            visible=visible.expand(self.batch, n, n),
            in_order=True,
            is_complete=is_complete,
        )

    def has_room(self, ahead: int | Tensor) -> Tensor:
        """Whether rows may take a draft so far after their root, and the target's own token.

        bool, [batch, 1] or as `ahead` [batch or 1, n] is.
        """
        return ahead < self._room

    def context(self, draft: Draft, first: int = 0, stop: int | None = None) -> Context:
        """The context to run nodes first..stop-1 of a draft (all by default) through any layers.

        What they see of the draft must have run through those layers already, or run with them.
        """
        stop = draft.num_nodes if stop is None else stop
        if draft.is_chain:
            return self.chain_context(first, stop - first)
        visible = ancestor_mask(draft.parents) if draft.visible is None else draft.visible
        view: SpanView | SlotView
        if draft.in_order and self._start is not None:
            extent = self._start + stop
            view = SpanView(self.cache, self._start + first, extent)
            seen = F.pad(visible[:, first:stop, :stop], (self._start, 0), value=True)
        else:
            extent = max(self.lengths) + draft.span
            view = SlotView(self.cache, self._row, draft.slot[:, first:stop], extent)
            visible = by_slot(visible[:, first:stop], draft.slot - self.length, draft.span)
            seen = after_prefix(visible, self.length, extent)
        key_position = self.tables.position[:, :extent]
        if any(self.tables.windows.values()):
            nodes = slice(stop if draft.in_order else None)
            key_position = key_position.expand(self.batch, -1).scatter(
                1, draft.slot[:, nodes], draft.position[:, nodes]
            )
        return self.runner.scattered(view, self.tables, draft.position[:, first:stop], seen, key_position)

    def packed(self, draft: Draft) -> Draft:
        """The same draft without gaps, its nodes in order: what has run of them is moved there."""
        slot = self.length + self._nodes[:, 1 : draft.num_nodes + 1]
        self.cache.move(self._row, draft.slot, slot, draft.entry_layer)
        return replace(draft, slot=slot, made=0, in_order=True)

    def chain_context(self, first: int, count: int) -> Context:
        """The context of rows first..first+count-1 of a chain that begins after the committed prefix."""
        if self._start is not None:
            begin = self._start + first
            span = SpanView(self.cache, begin, begin + count)
            return self.runner.span(span, self.tables, begin, count)
        begin = self.length + first  # [batch, 1]
        ahead = self._nodes[:, 1 : count + 1]
        extent = max(self.lengths) + first + count
        view = SlotView(self.cache, self._row, begin + ahead, extent)
        return self.runner.ragged(view, self.tables, begin, ahead, extent)

    def _rooms(self) -> list[int]:
        return [room for room, finished in zip(self.room, self.finished, strict=True) if not finished]


class Drafter(ABC):
    """A strategy: proposes a tree after each verification. One file each, one line in `strategies.py`.

    Subclasses name a frozen dataclass `Settings`; `make_drafter` fills and checks it.

    Attributes:
        settings: what the strategy was asked for.
        depth: the target is the model's first `depth` layers and its LM head.
        needs: layers whose outgoing states are handed to `start` and `advance`. After a draft that entered in
            mid-stack those below its entry layer are missing: the drafter made them itself.
        max_nodes: the largest `span` of its drafts, the root included.
        own_runners: those that it drafts with beside the target's.
        draws: whether a rule that samples draws its tokens (`Rule.draft`); else what it samples is, token by token,
            what plain decoding would.
    """

    Settings: ClassVar[type[Any]]
    needs: tuple[int, ...] = ()
    max_nodes: int = 1
    own_runners: tuple[Runner, ...] = ()
    draws: bool = False

    def __init__(self, runner: Runner, settings: Any) -> None:
        self.runner = runner
        self.settings = settings
        self.depth = runner.num_layers

    @classmethod
    def ranges(cls, runner: Runner) -> dict[str, Range]:
        """The valid range of each setting that is a number, on this model."""
        return {}

    def start(self, state: State, prompts: list[list[int]], hidden: dict[int, Tensor]) -> None:  # noqa: B027
        """After the prefill, with the states of the layers in `needs`, [batch, longest prompt, hidden]."""

    @abstractmethod
    def propose(self, state: State) -> Draft:
        """The next draft. Must not wait for the device."""

    def advance(self, outcome: Outcome) -> None:  # noqa: B027
        """After a verification, whose accepted path is in the cache by now."""
