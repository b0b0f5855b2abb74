"""Speculative sampling: drafts that are drawn, and a verification that leaves the target's distribution as it is.

Algorithm 1 of arXiv 2211.17192, algorithm 2 of arXiv 2302.01318.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eval.decoding.acceptance import Outcome, Rule, follow
from eval.decoding.shaping import Shaping
from eval.decoding.tree import Draft
from layerskip_model.errors import UserError
from layerskip_model.layer_dropout import uniform_hash

if TYPE_CHECKING:
    from eval.decoding.drafters.base import State

DRAFT, ACCEPT, OWN = range(3)  # the purposes that a random number can serve
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # as int64


class Drawing(Rule):
    """A rule that draws tokens.

    Every random number is a function of the seed, the row's stream, the place of the token in the row's new
    text and the purpose: to draw a draft for that place, to accept it, or to draw the target's own token
    there. So a row's output depends neither on its batch nor on the machine, but for rounding.

    The target's own token is the argmax of its logits with Gumbel noise of that place, which is a draw from their
    softmax.

    One decode at a time: `begin` draws the numbers for all its rows.
    """

    shaping: Shaping

    def __init__(self, shaping: Shaping, seed: int) -> None:
        self.shaping = shaping
        self.seed = seed

    def begin(self, state: State) -> None:
        """Draw the numbers of every row and bring them to the device at once."""
        shortest = min(state.prompt_lengths)
        table = random_numbers(self.seed, state.streams, state.cache.capacity - shortest + 1)
        self._table = torch.from_numpy(table).to(state.length.device)  # [batch, places, 3]
        self._row = torch.arange(state.batch, device=state.length.device)[:, None]
        self._begin = torch.tensor(state.prompt_lengths).to(state.length.device)[:, None]  # [batch, 1]
        # See `noise_ahead`: the step and its noise, and how many places the step before it and it itself wanted.
        self._ahead: tuple[Tensor | None, Tensor | None] = (None, None)
        self._before, self._wanted = 0, 0

    def numbers(self, position: Tensor, purpose: int) -> Tensor:
        """The numbers of places in the text, [batch, n] -> [batch, n]."""
        return self._table[self._row, position - self._begin, purpose]

    def noise_ahead(self, state: State, logits: Tensor, first: int) -> Tensor:
        """The noise of the places after nodes first, first + 1, ... of a chain, like logits [batch, m, vocab].

        Drafting and verification want that of the same places, and of a small vocabulary one call for all of them takes
        hardly longer than for one: so it is made once in a step, for as many places as the step before wanted.
        """
        stop = first + logits.shape[1]
        step, made = self._ahead
        if step is not state.length:
            self._before, self._wanted, made = self._wanted, 0, None
        self._wanted = max(self._wanted, stop)
        if made is not None and stop <= made.shape[1] and _are_alike(made, logits):
            return made[:, first:stop]
        reach = max(stop, self._before)
        position = state.length + torch.arange(1, reach + 1, device=state.length.device)
        made = gumbel_noise(self.numbers(position, OWN), logits)
        self._ahead = state.length, made
        return made[:, first:stop]

    def with_noise(self, state: State, shaped: Tensor, draft: Draft) -> Tensor:
        """Shaped logits after a draft's last m nodes [batch, m, vocab], and the noise of the places that follow."""
        m = shaped.shape[1]
        if draft.is_chain:
            return shaped + self.noise_ahead(state, shaped, draft.num_nodes - m)
        return shaped + gumbel_noise(self.numbers(draft.position[:, -m:] + 1, OWN), shaped)

    def own(self, state: State, shaped: Tensor, draft: Draft) -> Tensor:
        """The target's own tokens after every node of a draft, [batch, n]; -1 where no token is possible.

        Shaped logits [batch, n, vocab].
        """
        return best_possible(self.with_noise(state, shaped, draft))

    def own_at(self, logits: Tensor, position: Tensor) -> Tensor:
        """The target's own tokens for any places in the text, [batch, n]; logits [batch, n, vocab]."""
        return best_possible(logits + gumbel_noise(self.numbers(position, OWN), logits))


class Sampling(Drawing):
    """Draws tokens; the target's distribution p is kept exactly, whatever the drafter's q.

    A draft x ~ q is accepted with probability min(1, p(x) / q(x)). The first one that is not is replaced by a
    token from norm(max(p - q, 0)); when all are accepted, one more token comes from p. Both p and q are shaped
    alike. Autoregressive decoding is the case of no drafts.

    Numbers of a place are used again when a draft there is discarded because an earlier one was rejected. That
    is sound: whether the draft at a place is accepted, and what replaces it there, depends on numbers of that
    place and of places before it only, never on what was drafted after it. So the tokens kept by a step, and
    how many they are, say nothing about the numbers of the places after them, and to the next step, which uses
    only those, they are as good as new. How many drafts a step has depends on the text and the room left, not
    on numbers of later places; a draft that is padding is not looked at, and its place's numbers are used by
    the step that gets there. The target's own token takes its number by its place too, after accepted drafts
    as after a rejected one.

    Drafts that were not drawn (q is None) are tried with the target's own token: it is drawn after every node by
    its place's noise, and where a child says the same the path goes on there. So the output is, token by token,
    the one that plain sampling draws from the same stream, whatever was drafted: a drafter may look at the noise.
    One that proposes the tokens which it prefers itself by that noise (`preferences`) is right nearly as often as
    where the likeliest token is wanted (the coupling of arXiv 2408.07978, with several drafts for a place).
    Drafts that do not depend on the noise are accepted as if they were tried one by one, each with the
    probability that is left to it.
    """

    def preferences(self, state: State, logits: Tensor, draft: Draft) -> Tensor:
        """Shaped logits and the noise of the places after those nodes."""
        return self.with_noise(state, self.shaped(state, logits, draft), draft)

    def first_choice(self, state: State, logits: Tensor, tokens: list[Tensor]) -> Tensor:
        """The best of these preferences."""
        shaped = self.shaping.after_chain(state, logits, tokens)
        return (shaped + self.noise_ahead(state, shaped, len(tokens) - 1)).argmax(dim=-1)

    def draft(self, state: State, logits: Tensor, tokens: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """A token drawn from q, [batch, 1], and q, [batch, 1, vocab]."""
        q = self.shaping.after_chain(state, logits, tokens).softmax(dim=-1)
        return draw(q, self.numbers(state.length + len(tokens), DRAFT)), q

    def accept(self, state: State, logits: Tensor, draft: Draft) -> Outcome:
        """Accept drafts up to the first rejection and draw the target's own token.

        Raises ValueError for a tree of drawn tokens; UserError where no token has a probability.
        """
        shaped = self.shaped(state, logits, draft)
        if draft.q is None:
            outcome = follow(self.own(state, shaped, draft), logits, draft)
        else:
            outcome = self._reject(shaped.softmax(dim=-1), draft.q, logits, draft)
        check_possible(state, outcome)
        return outcome

    def _reject(self, p: Tensor, q: Tensor, logits: Tensor, draft: Draft) -> Outcome:
        """Speculative sampling by p [batch, n, vocab] of a chain that was drawn from q, [batch, n - 1, vocab]."""
        if not draft.is_chain:
            raise ValueError("drawn drafts are verified in chains only; a tree's tokens must not be drawn")
        drafts = draft.tokens[:, 1:]  # [batch, n - 1]
        proposed = (draft.valid & draft.candidate)[:, 1:]
        # 1. Accept drafts up to the first that is rejected or not up for acceptance.
        kept = self.numbers(draft.position[:, 1:], ACCEPT) < acceptance(p[:, :-1], q, drafts)
        taken = (kept & proposed).cumprod(dim=1).sum(dim=1, keepdim=True)  # [batch, 1]
        # 2. Draw the target's own token after the last accepted node.
        weights = own_weights(p, q, proposed, taken)  # [batch, 1, vocab]
        own = self.own_at(weights.log(), draft.position.gather(1, taken) + 1)  # [batch, 1]
        # 3. Tell the host: the step's one synchronisation.
        columns = [taken, own, proposed.sum(dim=1, keepdim=True), drafts]
        outcome = Outcome(draft, [], [], [], logits)
        for count, token, drafted, *tokens in torch.cat(columns, dim=1).tolist():
            outcome.path.append(list(range(count + 1)))
            outcome.tokens.append([*tokens[:count], token])
            outcome.drafted.append(drafted)
        return outcome


def random_numbers(seed: int, streams: list[int], places: int) -> np.ndarray:
    """Numbers in [0, 1) by stream, place in the new text and purpose, float64 [streams, places, 3]."""
    purpose = np.arange(3, dtype=np.uint64)
    place = np.arange(places, dtype=np.uint64)[:, None]
    stream = np.asarray(streams, dtype=np.uint64)[:, None, None]
    return uniform_hash(seed, 0, stream, place, purpose)


def gumbel_noise(numbers: Tensor, like: Tensor) -> Tensor:
    """Standard Gumbel noise for every token, a function of a place's number and the token alone.

    numbers [...] in [0, 1), like [..., vocab] -> [..., vocab], of its dtype. Always finite.
    """
    mixed = (numbers * 2.0**53).long()[..., None] ^ _of_tokens(like.shape[-1], like.device)
    bits = (_mixed(mixed) >> 11) & (2**53 - 1)
    uniform = ((bits.to(like.dtype) + 0.5) * 2.0**-53).clamp(max=1 - torch.finfo(like.dtype).eps)
    return -(-(-uniform).log1p()).log()  # small numbers, the ones that decide, are the exact ones


def best_possible(logits: Tensor) -> Tensor:
    """The best token, logits [..., vocab] -> [...]; -1 where none is possible."""
    best, tokens = logits.max(dim=-1)
    return torch.where(best > -torch.inf, tokens, -1)


def _are_alike(noise: Tensor, logits: Tensor) -> bool:
    """Whether noise that was made for other logits serves these."""
    return (noise.shape[2], noise.dtype, noise.device) == (logits.shape[2], logits.dtype, logits.device)


@cache
def _of_tokens(vocab_size: int, device: torch.device) -> Tensor:
    """A number for every token, int64 [vocab]."""
    with torch.inference_mode(False):
        return _mixed(torch.arange(vocab_size, device=device) * MULTIPLIERS[0])


def _mixed(value: Tensor) -> Tensor:
    """A one-to-one scrambling of int64, which wraps around (SplitMix64's, without its last step)."""
    for multiplier in MULTIPLIERS:
        value = (value ^ ((value >> 30) & (2**34 - 1))) * multiplier
    return value


def acceptance(p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
    """min(1, p(x) / q(x)) for tokens x [batch, n], drawn from q; p and q [batch, n, vocab]."""
    index = tokens[..., None]
    return (p.gather(2, index) / q.gather(2, index))[..., 0].clamp(max=1.0)


def own_weights(p: Tensor, q: Tensor, proposed: Tensor, taken: Tensor) -> Tensor:
    """What the target's own token is drawn from, [batch, 1, vocab], not normalised.

    p [batch, n, vocab], q [batch, n - 1, vocab], proposed [batch, n - 1], taken [batch, 1]. After a rejected
    draft it is the residual; where no draft was up for acceptance it is p.
    """
    last = q.shape[1] - 1
    draft = taken.clamp(max=last)  # the one after the last that was accepted, or else the last one
    target = p.gather(1, taken[..., None].expand(-1, -1, p.shape[2]))
    drafter = q.gather(1, draft[..., None].expand(-1, -1, p.shape[2]))
    rejected = proposed.gather(1, draft) & (taken <= last)
    return torch.where(rejected[..., None], residual(target, drafter), target)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), [..., vocab], not normalised; p where that is nothing.

    It is nothing if p equals q, when no draft is rejected, or all but equals it and one is, by rounding.
    """
    rest = (p - q).clamp(min=0.0)
    return torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)


def draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """Draw tokens by weights that need not be normalised: inverse of the cumulative distribution.

    Weights [..., vocab] and numbers from 0 to 1, [...] -> [...]. Never a token of weight 0, also for a number
    of 1 and where sums are rounded (unless all weights are 0 or some are not numbers: then token 0).
    """
    # A device adds in parallel: rounding may let a sum rise where the weight is 0.
    total = weights.cumsum(dim=-1, dtype=torch.float64).masked_fill_(weights <= 0, 0.0)
    mark = numbers.clamp(max=1 - 2.0**-53)[..., None] * total.amax(dim=-1, keepdim=True)
    return (total > mark).byte().argmax(dim=-1)  # the first


def check_possible(state: State, outcome: Outcome) -> None:
    """Raises UserError where a row that goes on was to get a token and none could be drawn."""
    for row, tokens in enumerate(outcome.tokens):
        if tokens[-1] < 0 and not state.finished[row]:
            raise UserError(
                f"prompt {row}: no token has a probability there: the generation config forbids every one, or "
                "the logits are not numbers; relax it, raise the temperature, or load the model with another --dtype"
            )
