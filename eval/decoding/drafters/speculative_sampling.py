"""Speculative sampling: a separate, smaller model drafts (arXiv 2211.17192, arXiv 2302.01318)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from eval.decoding.acceptance import Outcome
from eval.decoding.drafters.base import Drafter, Range, State
from eval.decoding.tree import Draft
from layerskip_model.runner import Runner


@dataclass(frozen=True)
class DraftModel:
    """A model that drafts for another one of the same vocabulary. `name` is how the user called it."""

    spoken: ClassVar[str] = (
        "the directory or hub name of a smaller model with the same tokenizer (--draft DIR)"
    )

    name: str
    runner: Runner = field(repr=False)


class SpeculativeSampling(Drafter):
    """Drafts a chain with the draft model, one pass a draft, over a cache of its own.

    The draft model's state stands one token behind the target's: of the tokens kept by a step only the last can be
    missing in its cache, the last draft where all were accepted. Then the next step's first pass runs that token
    too. Rows beyond the draft model's context get no drafts.
    """

    draws = True

    @dataclass(frozen=True)
    class Settings:
        """draft: the draft model. num_speculations: the drafts a step."""

        draft: DraftModel
        num_speculations: int = 4

    def __init__(self, runner: Runner, settings: Settings) -> None:
        super().__init__(runner, settings)
        self.draft_runner = settings.draft.runner
        self.own_runners = (self.draft_runner,)
        self.num_speculations = settings.num_speculations
        self.max_nodes = settings.num_speculations + 1

    @classmethod
    def ranges(cls, runner: Runner) -> dict[str, Range]:
        """At least one draft."""
        return {"num_speculations": (1, None)}

    def start(self, state: State, prompts: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """Run the prompts through the draft model."""
        runner = self.draft_runner
        self._behind = State(runner, prompts, state.horizon, self.max_nodes, state.rule, state.streams)
        self._lacks_a_token = False
        width = max(map(len, prompts))
        padded = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts]).to(runner.device)
        self._run(padded, 0, head=False)

    def propose(self, state: State) -> Draft:
        """A chain of up to `num_speculations` drafts, fewer near the end of the text or of either context."""
        drafts, reach = self._chain_length(state)
        tokens = [state.last]  # [batch, 1] each
        q = []  # [batch, 1, vocab] each, if the drafts are drawn
        if drafts:
            behind = self._behind
            behind.cache.lengths = [length - 1 for length in state.lengths]
            behind.begin_step([text[-2] for text in state.texts], state.room, state.finished)
        for index in range(drafts):
            if index == 0 and self._lacks_a_token:
                logits = self._run(torch.cat([behind.last, state.last], dim=1), 0)
            else:
                logits = self._run(tokens[-1], index + 1)
            token, distribution = state.rule.draft(state, logits, tokens)
            tokens.append(token)
            if distribution is not None:
                q.append(distribution)
        return state.chain(
            torch.cat(tokens, dim=1), q=torch.cat(q, dim=1) if q else None, drafted=reach if drafts else None
        )

    def advance(self, outcome: Outcome) -> None:
        """Note whether the draft model has yet to see a row's last draft."""
        self._lacks_a_token = any(len(path) == outcome.draft.num_nodes for path in outcome.path)

    def _chain_length(self, state: State) -> tuple[int, Tensor | None]:
        """How many drafts to make, and how many of them each row may use, [batch, 1]; None for all of them.

        A draft needs the draft model at the place before its own.
        """
        context = self.draft_runner.context_length
        lengths = [length for length, ended in zip(state.lengths, state.finished, strict=True) if not ended]
        drafts = state.chain_length(self.num_speculations)
        if max(lengths) + drafts <= context:
            return drafts, None
        if min(lengths) >= context:
            return 0, None
        if not state.runner.fixed_shapes:
            drafts = min(drafts, context - min(lengths))
        return drafts, (context - state.length).clamp(min=0)

    def _run(self, tokens: Tensor, first: int, *, head: bool = True) -> Tensor:
        """The draft model over these tokens [batch, n], `first` after its state's place.

        Returns the logits after the last of them in the target's vocabulary, [batch, 1, vocab]; without `head`
        nothing of use.
        """
        runner = self.draft_runner
        if runner.vocab_size < self.runner.vocab_size:  # the target may say what the draft model cannot
            tokens = tokens.clamp(max=runner.vocab_size - 1)
        context = self._behind.chain_context(first, tokens.shape[1])
        result = runner.forward(tokens, 0, runner.num_layers, context, head=head)
        return (
            result.hidden if result.logits is None else fitted(result.logits[:, -1:], self.runner.vocab_size)
        )


def fitted(logits: Tensor, width: int) -> Tensor:
    """Logits [..., vocab] in a vocabulary of `width` tokens: the same, less or more padding at the end.

    What is cut off cannot be drafted, and what is added has probability 0.
    """
    missing = width - logits.shape[-1]
    return F.pad(logits, (0, missing), value=float("-inf")) if missing > 0 else logits[..., :width]
