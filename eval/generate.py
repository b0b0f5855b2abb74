"""Decode one prompt with one strategy, for a person or for a program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from eval.decoding.speculate import Generation, Stop, decode
from eval.decoding.stopping import StopStrings
from eval.decoding.strategies import make_drafter, strategy_name
from eval.target import Target
from layerskip_model.errors import UserError


@dataclass(frozen=True)
class Generator:
    """A target with a strategy and its limits: `generate` from Python, `show` on a terminal."""

    target: Target
    strategy: str
    settings: dict[str, Any]
    max_new_tokens: int
    stop: Stop | None = None

    @classmethod
    def make(
        cls,
        target: Target,
        strategy: str = "autoregressive",
        *,
        max_new_tokens: int = 512,
        stop: Sequence[str] = (),
        **settings: Any,
    ) -> Self:
        """Check the strategy and its settings (None: not given; then what the target's run suggests).

        Raises UserError.
        """
        name = strategy_name(strategy)
        given = {key: value for key, value in settings.items() if value is not None}
        if name != "autoregressive" and target.run is not None:
            given = target.run.suggested | given
        make_drafter(name, target.runner, **given)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens (--max_steps) {max_new_tokens}: give 1 or more")
        return cls(target, name, given, max_new_tokens, StopStrings(target.tokenizer, stop) if stop else None)

    def generate(self, prompts: list[str]) -> list[Generation]:
        """Continue the prompts in one batch; the tokens and what they cost. Raises UserError."""
        return decode(
            self.target.runner,
            make_drafter(self.strategy, self.target.runner, **self.settings),
            [self.target.encode(prompt) for prompt in prompts],
            max_new_tokens=self.max_new_tokens,
            eos_token_ids=self.target.eos_token_ids,
            stop=self.stop,
        )

    def text(self, generation: Generation) -> str:
        """The text of the new tokens, special tokens left out."""
        return str(self.target.tokenizer.decode(generation.tokens, skip_special_tokens=True))

    def show(self, prompt: str) -> None:
        """Print the continuation on standard output and what it cost on standard error."""
        generation = self.generate([prompt])[0]
        print(prompt + self.text(generation), flush=True)
        seconds = generation.prefill_seconds + generation.decode_seconds
        cost = f"{len(generation.tokens)} tokens, {len(generation.tokens) / seconds:.1f} tokens/s"
        if generation.drafted:
            rate = generation.accepted / generation.drafted
            length = sum(generation.accepted_lengths) / len(generation.accepted_lengths)
            cost += f", acceptance rate {rate:.2f}, acceptance length {length:.2f}"
        print(f"[{cost}, ended by {generation.finish_reason}]", file=sys.stderr)


def interact(generator: Generator) -> None:
    """Answer prompts line by line until the end of the input; a bad one is said and the next is read."""
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        try:
            generator.show(prompt)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
