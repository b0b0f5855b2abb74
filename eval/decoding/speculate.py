"""The decoding loop: one for every strategy.

A drafter proposes a tree, the target verifies it in one forward, an acceptance rule takes a path, the cache
keeps that path.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eval.clock import now
from eval.decoding.acceptance import Greedy, Outcome, Rule
from eval.decoding.drafters.base import Drafter, State
from eval.decoding.tree import Draft
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner

Stop = Callable[[list[int]], bool]  # the new tokens so far -> the last one ends the generation


class Listener:
    """Is told what happens while it happens. Subclasses say what they want to hear."""

    wants_drafts = False  # reading a draft waits for the device

    def drafted(self, row: int, tokens: list[int]) -> None:
        """A chain was proposed for this row of the batch; its acceptance is not known yet."""

    def emitted(self, row: int, tokens: list[int]) -> None:
        """These tokens are now part of the row's output."""


@dataclass
class Generation:
    """What one prompt got.

    Attributes:
        tokens: the new tokens, an end-of-sequence token included.
        finish_reason: eos, stop, length (max_new_tokens) or context (the model's context length).
        prefill_seconds, decode_seconds: wall time of the whole batch, the device synchronised.
        target_forwards: forwards of the target after the prefill, until this row ended.
        accepted_lengths: tokens won by each of them, the bonus included, before the final cut.
        drafted, accepted: drafts that were up for acceptance, and those accepted.
        proposals_at, accepted_at: for chains, proposals that had a draft at position i = 0, 1, ..., and those
            that were accepted up to it.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    target_forwards: int = 0
    accepted_lengths: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    proposals_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    def count(self, drafted: int, won: int, is_chain: bool) -> None:
        """Count one verification: `drafted` drafts were proposed, `won` tokens came of it."""
        self.target_forwards += 1
        self.accepted_lengths.append(won)
        self.drafted += drafted
        self.accepted += won - 1
        if is_chain:
            missing = drafted - len(self.proposals_at)
            self.proposals_at += [0] * missing
            self.accepted_at += [0] * missing
            for index in range(drafted):
                self.proposals_at[index] += 1
                self.accepted_at[index] += index < won - 1


@dataclass(frozen=True)
class Limits:
    """When a row ends: after `room` tokens, for the reason `at_room`, or by a token or a stop string."""

    room: int
    at_room: str
    eos_token_ids: frozenset[int]
    stop: Stop | None

    def extend(self, generation: Generation, tokens: list[int]) -> list[int]:
        """Append tokens one by one until one of them ends the row, and return those appended."""
        begin = len(generation.tokens)
        for token in tokens:
            generation.tokens.append(token)
            if token in self.eos_token_ids:
                generation.finish_reason = "eos"
            elif self.stop is not None and self.stop(generation.tokens):
                generation.finish_reason = "stop"
            elif len(generation.tokens) == self.room:
                generation.finish_reason = self.at_room
            if generation.finish_reason:
                break
        return generation.tokens[begin:]


@torch.inference_mode()
def decode(
    runner: Runner,
    drafter: Drafter,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    stop: Stop | None = None,
    rule: Rule | None = None,
    streams: Sequence[int] | None = None,
    listener: Listener | None = None,
) -> list[Generation]:
    """Continue every prompt, all of them in one batch.

    Rows may differ in prompt length, accept different lengths and end at different times; each ends where it
    would alone. `rule` is greedy by default. `streams`: for a rule that draws, the number of each row's own
    stream of random numbers (by default 0, 1, ...), so that a row's output does not depend on its batch.

    Raises UserError for a prompt that is empty, foreign to the vocabulary, or as long as the model's context.
    """
    assert not runner.model.training, "the model is in training mode: call model.eval() before decoding"
    limits = row_limits(runner, prompts, max_new_tokens, frozenset(eos_token_ids), stop)
    if not prompts:
        return []
    generations = [Generation() for _ in prompts]
    rule = Greedy() if rule is None else rule
    began = now(runner.device)

    # 1. Prefill. It gives the first token, as a verification of the prompt's last token would.
    horizon = max(len(prompt) + limit.room for prompt, limit in zip(prompts, limits, strict=True))
    state = State(runner, prompts, horizon, drafter.max_nodes, rule, streams)
    rule.begin(state)
    logits, states = prefill(state, drafter, prompts)
    outcome = rule.accept(state, logits, state.chain(state.last))
    keep(state, outcome)
    settle(state, outcome, limits, generations, listener)
    drafter.start(state, prompts, states)
    prefilled = now(runner.device)

    while not all(state.finished):
        # 2. Propose a tree.
        draft = drafter.propose(state)
        if listener is not None and listener.wants_drafts:
            tell(listener, state, draft)
        # 3. Verify it: one forward of the layers that have not seen it yet.
        logits, states = verify(state, drafter, draft)
        # 4. Accept a path and the target's own next token.
        outcome = rule.accept(state, logits, draft)
        outcome.states.update(states)
        count(state, outcome, generations)
        # 5. Keep that path in the cache; the next draft overwrites the rest.
        keep(state, outcome)
        # 6. Emit the tokens one by one, to each row's end.
        settle(state, outcome, limits, generations, listener)
        # 7. Let the drafter learn what came of its draft.
        drafter.advance(outcome)

    decode_seconds = now(runner.device) - prefilled
    for generation in generations:
        generation.prefill_seconds, generation.decode_seconds = prefilled - began, decode_seconds
    return generations


def row_limits(
    runner: Runner, prompts: list[list[int]], max_new_tokens: int, eos: frozenset[int], stop: Stop | None
) -> list[Limits]:
    """The limits of each row. Raises UserError for a request that cannot be met."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} asks for nothing; give 1 or more")
    limits = []
    for row, prompt in enumerate(prompts):
        check_prompt(runner, row, prompt)
        room = runner.context_length - len(prompt)
        at_room = "length" if max_new_tokens <= room else "context"
        limits.append(Limits(min(room, max_new_tokens), at_room, eos, stop))
    return limits


def check_prompt(runner: Runner, row: int, prompt: list[int]) -> None:
    """Raises UserError for a prompt that is empty, too long, or foreign to the vocabulary."""
    if not prompt:
        raise UserError(f"prompt {row} is empty; give at least one token, such as the begin-of-text token")
    if len(prompt) >= runner.context_length:
        raise UserError(
            f"prompt {row} has {len(prompt)} tokens and the model's context is {runner.context_length}; "
            f"shorten the prompt to {runner.context_length - 1} or fewer"
        )
    foreign = [token for token in prompt if not 0 <= token < runner.vocab_size]
    if foreign:
        raise UserError(
            f"prompt {row} has token {foreign[0]} and the model's vocabulary {runner.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )


def prefill(state: State, drafter: Drafter, prompts: list[list[int]]) -> tuple[Tensor, dict[int, Tensor]]:
    """Run the prompts and leave each one's last token as the root of a draft.

    Returns the logits of those roots, [batch, 1, vocab], and the states needed. Shorter prompts are padded on
    the right: nothing before the padding sees it, and it is overwritten later.
    """
    runner = drafter.runner
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    padded = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts]).to(runner.device)
    context = state.chain_context(0, width)
    hidden, states = runner.run_reading(runner.embed(padded), 0, drafter.depth, context, drafter.needs)
    row = torch.arange(len(prompts), device=hidden.device)
    last = torch.tensor(lengths, device=hidden.device) - 1
    state.cache.lengths = [length - 1 for length in lengths]
    state.begin_step([prompt[-1] for prompt in prompts], state.room, state.finished)
    return runner.logits(hidden[row, last][:, None]), states


def verify(state: State, drafter: Drafter, draft: Draft) -> tuple[Tensor, dict[int, Tensor]]:
    """Run the target over a draft. Returns logits [batch, n, vocab] and the states that the drafter needs."""
    assert draft.span <= drafter.max_nodes, "a draft is larger than its drafter's max_nodes"
    runner = drafter.runner
    context = state.context(draft)
    inputs = draft.tokens if draft.hidden is None else draft.hidden  # [batch, n] or [batch, n, hidden]
    result = runner.forward(inputs, draft.entry_layer, drafter.depth, context, needs=drafter.needs)
    assert result.logits is not None
    return result.logits, result.states


def tell(listener: Listener, state: State, draft: Draft) -> None:
    """Let a listener see a chain before it is verified."""
    if draft.is_chain:
        for row, (tokens, valid) in enumerate(zip(draft.tokens.tolist(), draft.valid.tolist(), strict=True)):
            drafted = [token for token, real in zip(tokens[1:], valid[1:], strict=True) if real]
            if drafted and not state.finished[row]:
                listener.drafted(row, drafted)


def count(state: State, outcome: Outcome, generations: list[Generation]) -> None:
    """Count a verification for the rows it was for; those that had ended keep nothing of it."""
    for row, generation in enumerate(generations):
        if state.finished[row]:
            outcome.path[row], outcome.tokens[row] = [], []
        else:
            generation.count(outcome.drafted[row], len(outcome.tokens[row]), outcome.draft.is_chain)


def keep(state: State, outcome: Outcome) -> None:
    """Make each accepted path the new end of its row in the cache, as far as the row has room."""
    path = [nodes[:room] for nodes, room in zip(outcome.path, state.room, strict=True)]
    state.cache.keep(path, None if outcome.draft.in_order else outcome.draft.slot)


def settle(
    state: State,
    outcome: Outcome,
    limits: list[Limits],
    generations: list[Generation],
    listener: Listener | None,
) -> None:
    """Emit each row's tokens up to its end, and begin the next step from the last ones."""
    for row, (limit, generation) in enumerate(zip(limits, generations, strict=True)):
        emitted = limit.extend(generation, outcome.tokens[row])
        state.texts[row] += emitted
        if emitted and listener is not None:
            listener.emitted(row, emitted)
    state.begin_step(
        last=[generation.tokens[-1] for generation in generations],
        room=[limit.room - len(row.tokens) for limit, row in zip(limits, generations, strict=True)],
        finished=[bool(generation.finish_reason) for generation in generations],
    )
