"""How well heads guess a target's own text: at each place, the rank of the token that really follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from eval.choosing import Choosing, make_rule
from eval.decoding.acceptance import Rule
from eval.decoding.drafters.base import State
from eval.decoding.drafters.heads import HeadsDrafter
from eval.decoding.speculate import decode, prefill
from eval.decoding.strategies import make_drafter
from eval.prompts import Prompt, make_batches
from eval.strategy_spec import BASELINE
from eval.target import Target

TOP = 10  # ranks that are looked at: 0..9
MISSING = -1  # in place of a rank: the text ends before that token
TOGETHER = 16  # prompts in a batch
SHOWN = (1, 3, 5, 10)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Text:
    """A prompt with its continuation by the target: `tokens`, the first `given` of them the prompt's.

    `stream`: that of the random numbers which the continuation was drawn with.
    """

    tokens: list[int]
    given: int
    stream: int = 0

    @property
    def prompt(self) -> list[int]:
        """The prompt's tokens."""
        return self.tokens[: self.given]

    @property
    def new(self) -> list[int]:
        """The continuation's."""
        return self.tokens[self.given :]


@dataclass(frozen=True)
class Accuracy:
    """How often the next token, for the LM head, or one further on is among a head's first choices.

    Attributes:
        head: 0 for the LM head, 1, 2, ... for drafting heads.
        top: how many first choices, SHOWN -> the share of places.
        count: places that have the token that it guesses.
    """

    head: int
    top: dict[int, float]
    count: int


def with_bar(items: Sequence[Item], title: str) -> Iterable[Item]:
    """The items, with a bar on a terminal while they are worked through."""
    console = Console(stderr=True)
    return track(items, title, console=console, transient=True, disable=not console.is_terminal)


def continued(
    target: Target, prompts: Sequence[Prompt], max_new_tokens: int, choosing: Choosing | None = None
) -> list[Text]:
    """Those of the prompts that fit the context, with the target's continuations, by default its greedy ones.

    UserError if none fits.
    """
    size = min(TOGETHER if target.runner.takes_masks else 1, len(prompts))
    batches, unfit = make_batches(target, list(prompts), size)
    if not batches:
        raise unfit[prompts[0].index]
    texts = []
    for batch in with_bar(batches, "continuing prompts"):
        rows = decode(
            target.runner,
            make_drafter(BASELINE, target.runner),
            batch.tokens,
            max_new_tokens=max_new_tokens,
            eos_token_ids=target.eos_token_ids,
            rule=make_rule(target, choosing or Choosing()),
            streams=batch.streams,
        )
        texts += [
            Text(prompt + row.tokens, len(prompt), stream)
            for prompt, row, stream in zip(batch.tokens, rows, batch.streams, strict=True)
        ]
    return texts


@torch.inference_mode()
def text_ranks(drafter: HeadsDrafter, text: Text, rule: Rule) -> Tensor:
    """Teacher-forced ranks of the continuation's tokens, int64 [places, 1 + heads], on the CPU.

    Place i is where decoding may draft from: the state that token `given` + i is predicted from. Column 0 is the rank
    of that token among what the rule prefers by the LM head's logits, column k that of the token k after it by head
    k's; TOP where the token is not among the first TOP, MISSING where there is none.
    """
    runner = drafter.runner
    places, first = len(text.new), text.given - 1
    state = State(runner, [text.prompt], len(text.tokens), places, rule, [text.stream])
    rule.begin(state)
    _, states = prefill(state, drafter, [text.tokens])
    leaving = states[runner.num_layers - 1][0]  # [seq, hidden]
    tokens = torch.tensor(text.tokens, device=leaving.device)
    # The continuation as the draft after the prompt: so the rule knows where each guess stands.
    state.cache.lengths = [first]
    state.begin_step([text.tokens[first]], [places + 1], [False])
    draft = state.chain(tokens[None, first:-1])
    found = torch.full((places, 1 + drafter.settings.draft.number), MISSING)
    along = drafter.along(runner.normed(leaving), tokens, first)
    for head, logits in enumerate([runner.logits(leaving[first:-1]), *along]):
        if len(logits):
            preferred = rule.preferences(state, logits[None], draft)[0]
            found[: len(logits), head] = ranks_of(preferred, tokens[text.given + head :]).cpu()
    return found


def ranks_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The ranks from 0 on of tokens [places] among logits [places, vocab]; TOP for one that is not among the first."""
    best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices.to(tokens.device)
    hits = best == tokens[:, None]
    return torch.where(hits.any(dim=-1), hits.int().argmax(dim=-1), TOP)


def accuracies(ranks: Sequence[Tensor]) -> list[Accuracy]:
    """Of the LM head and of every other, over all texts' ranks."""
    found = []
    for head, column in enumerate(torch.cat(list(ranks)).unbind(dim=1)):
        seen = column[column != MISSING]
        top = {best: float((seen < best).double().mean()) if len(seen) else 0.0 for best in SHOWN}
        found.append(Accuracy(head, top, len(seen)))
    return found
