"""Lookahead decoding: the model guesses far ahead of itself and tries its earlier guesses (arXiv 2402.02057).

Every step is one masked forward over one tree with two branches:

- the window: W columns of N - 1 levels. Level 0 is a chain that begins with the root; the token at level l of column c
  stands at root + c + l and sees level 0 up to its column, and its own column's levels below it. What the target says
  after the last level is one token more for every column: the newest level. So each column gives an n-gram of N tokens,
  which goes into a pool, and the window goes on without its oldest level (section 3 and figure 2 of the paper).
- the guesses: up to G n-grams of the pool that begin with the root's token. Only these may be accepted.

As in its authors' implementation, the root is the first column's token of level 0, so that one n-gram begins with a
token that is no guess, and the window moves on by one token however many were won. The pool takes the text's own
n-grams, too: on a small model of code 5 to 9 % more tokens a step, nearly all by what was generated, few by the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.decoding.acceptance import Outcome
from eval.decoding.drafters.base import Drafter, Range, State
from eval.decoding.tree import Draft, ancestor_mask
from layerskip_model.runner import Runner


class Lookahead(Drafter):
    """Drafts n-grams that a window of the model's own guesses has come upon, or that the text has.

    A window's new token is the one that the target itself would say there by the rule: where that samples, by the noise
    of the token's own place (`Rule.preferences`). So a window foresees samples, too, and its n-grams still are drafts
    that were not drawn: whatever is drafted, the output is that of plain decoding, token by token.
    """

    @dataclass(frozen=True)
    class Settings:
        """window: W, columns. level: N, tokens of an n-gram. guess_set: G, n-grams kept for a token and tried.

        A step has up to (W + G)(N - 1) rows. The defaults are for a small model on a few CPU cores, where a row more
        costs a twentieth of a step and larger windows win less than they cost; on a GPU rows are all but free, and the
        paper takes 5 to 7 of each for 7B.
        """

        window: int = 2
        level: int = 3
        guess_set: int = 2

    def __init__(self, runner: Runner, settings: Settings) -> None:
        super().__init__(runner, settings)
        self.max_nodes = (settings.window + settings.guess_set) * (settings.level - 1)
        self._layouts: dict[int, Layout] = {}  # by the number of guesses

    @classmethod
    def ranges(cls, runner: Runner) -> dict[str, Range]:
        """An n-gram has a token to begin with and at least one to try."""
        return {"window": (1, None), "level": (2, None), "guess_set": (1, None)}

    def start(self, state: State, prompts: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """Open a window and an empty pool for every row."""
        self._state = state
        self._windows = [Window(self.settings, prompt) for prompt in prompts]

    def propose(self, state: State) -> Draft:
        """The guesses and the window behind the root. Rows with fewer guesses than others have padding."""
        ready = zip(self._windows, state.texts, state.room, state.finished, strict=True)
        guesses = [[] if finished else window.guesses(text, room) for window, text, room, finished in ready]
        layout = self._layout = self._layout_for(max(map(len, guesses)))
        rows = [layout.fill(row, window) for row, window in zip(guesses, self._windows, strict=True)]
        tokens = torch.tensor(rows).to(self.runner.device)  # [batch, n], -1 where there is no node
        shape = tokens.shape
        return Draft(
            tokens=tokens.clamp(min=0),
            parents=layout.parents.expand(shape),
            position=state.length + layout.depth,
            slot=state.length + layout.node,
            valid=tokens >= 0,
            candidate=layout.candidate.expand(shape),
            visible=layout.visible.expand(*shape, -1),
        )

    def advance(self, outcome: Outcome) -> None:
        """Move the windows on. Waits for the device once more: n-grams are looked up on the host."""
        first, last = self._layout.first, self._layout.last
        # The text has grown since the draft; only settings that look at the text notice, and only speed depends on it.
        wanted = self._state.rule.preferences(self._state, outcome.logits[:, first:], outcome.draft)
        newest = wanted[:, last - first].argmax(dim=-1).tolist()  # [batch][window]
        for window, tokens, won in zip(self._windows, newest, outcome.tokens, strict=True):
            if won:
                window.advance(tokens)

    def _layout_for(self, guesses: int) -> Layout:
        if guesses not in self._layouts:
            self._layouts[guesses] = Layout.make(self.settings, guesses, self.runner.device)
        return self._layouts[guesses]


@dataclass(frozen=True)
class Layout:
    """Where the nodes of a step with so many guesses are, for every row of the batch: root, guesses, window.

    Guesses are chains, not a trie of them: so nodes, mask and positions are the same at every step.

    Attributes:
        guesses: how many chains there is room for, each of `length` tokens.
        parents, depth, node, candidate: [n]; depth is the distance from the root, node is 0, 1, 2, ...
        visible: [n, n], the ancestors' mask.
        first, last: the nodes of the last level by column, [window], and the first of them.
    """

    guesses: int
    length: int
    parents: Tensor
    depth: Tensor
    node: Tensor
    candidate: Tensor
    visible: Tensor
    first: int
    last: Tensor

    @classmethod
    def make(cls, settings: Lookahead.Settings, guesses: int, device: torch.device) -> Layout:
        """The layout on that device."""
        parents, depth = [-1], [0]

        def add(parent: int) -> int:
            """A new node."""
            parents.append(parent)
            depth.append(depth[parent] + 1)
            return len(parents) - 1

        for _ in range(guesses):
            end = 0
            for _ in range(settings.level - 1):
                end = add(end)
        tried = len(parents)
        ends = [0]  # the newest node of every column
        for _ in range(settings.window - 1):
            ends.append(add(ends[-1]))
        for _ in range(settings.level - 2):
            ends = [add(end) for end in ends]
        node = torch.arange(len(parents), device=device)
        above = torch.tensor(parents, device=device)
        return cls(
            guesses=guesses,
            length=settings.level - 1,
            parents=above,
            depth=torch.tensor(depth, device=device),
            node=node,
            candidate=node < tried,
            visible=ancestor_mask(above[None])[0],
            first=ends[0],
            last=torch.tensor(ends, device=device),
        )

    def fill(self, guesses: Sequence[tuple[int, ...]], window: Window) -> list[int]:
        """The nodes' tokens [n] of one row of the batch, -1 for those that are padding."""
        (root, *zeroth), *others = window.levels
        chains = [[*guess, *[-1] * (self.length - len(guess))] for guess in guesses]
        chains += [[-1] * self.length] * (self.guesses - len(guesses))
        return [token for part in ([root], *chains, zeroth, *others) for token in part]


class Window:
    """The window and the pool of one row of the batch.

    Attributes:
        levels: N - 1 levels of W tokens; levels[l][c] stands at root + c + l. levels[0][0] is the root, once known.
        pool: first token -> the rests of the last G n-grams that began with it, the latest last.
    """

    def __init__(self, settings: Lookahead.Settings, prompt: list[int]) -> None:
        """Begin as if the end of the prompt came again."""
        self.settings = settings
        width, height = settings.window, settings.level - 1
        count = width + height - 1
        ahead = (prompt * count)[-count:]
        self.levels = [ahead[level : level + width] for level in range(height)]
        self.pool: dict[int, dict[tuple[int, ...], None]] = {}
        self._end = settings.level  # n-grams of the text that end before this place are in the pool

    def guesses(self, text: list[int], room: int) -> list[tuple[int, ...]]:
        """What is tried after this text, no longer than there is room for beside the target's own token."""
        self.levels[0][0] = text[-1]
        for end in range(self._end, len(text) + 1):
            self._remember(tuple(text[end - self.settings.level : end]))
        self._end = max(self._end, len(text) + 1)
        return [rest[: room - 1] for rest in self.pool.get(text[-1], ())] if room > 1 else []

    def advance(self, newest: list[int]) -> None:
        """Take up the newest level in place of the oldest.

        So the window stands one token further on. It does so where several tokens were won, too: were it to go along
        with them, new columns without a history would come in at its end, and 2 to 7 % fewer tokens be won a step.
        """
        for gram in zip(*self.levels, newest, strict=True):
            self._remember(gram)
        self.levels = [*self.levels[1:], newest]

    def _remember(self, gram: tuple[int, ...]) -> None:
        """Put an n-gram into the pool as the latest, and drop the oldest where there are too many."""
        first, *rest = gram
        known = self.pool.setdefault(first, {})
        known.pop(tuple(rest), None)
        known[tuple(rest)] = None
        if len(known) > self.settings.guess_set:
            del known[next(iter(known))]
