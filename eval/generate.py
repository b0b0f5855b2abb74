"""Decode prompts with one strategy, for a person or for a program."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self

from eval.choosing import Choosing, make_rule, peer_config
from eval.decoding.speculate import Generation, Listener, Stop, decode
from eval.decoding.stopping import StopStrings
from eval.decoding.strategies import make_drafter, strategy_name
from eval.drafts import with_loaded_drafts
from eval.strategy_spec import suggested
from eval.streaming import Live, Page, TextStream
from eval.target import Target
from eval.terminal import open_output
from layerskip_model.errors import UserError


@dataclass(frozen=True)
class Generator:
    """A target with a strategy and its limits: `generate` from Python, `show` for standard output."""

    target: Target
    strategy: str
    settings: dict[str, Any]
    max_new_tokens: int
    stop: Stop | None = None
    choosing: Choosing = field(default_factory=Choosing)

    @classmethod
    def make(
        cls,
        target: Target,
        strategy: str = "autoregressive",
        *,
        max_new_tokens: int = 512,
        stop: Sequence[str] = (),
        choosing: Choosing | None = None,
        **settings: Any,
    ) -> Self:
        """Check the strategy and its settings (None: not given; then what the run suggests).

        `draft`, a draft model or heads, may be a directory or hub name. `choosing`: greedy by default.
        Raises UserError.
        """
        name = strategy_name(strategy)
        given = {key: value for key, value in settings.items() if value is not None}
        given = with_loaded_drafts(target, name, suggested(target, name, given) | given)
        make_drafter(name, target.runner, **given)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens (--max_steps) {max_new_tokens}: give 1 or more")
        choosing = choosing or Choosing()
        make_rule(target, choosing)
        stopping = StopStrings(target.tokenizer, stop) if stop else None
        return cls(target, name, given, max_new_tokens, stopping, choosing)

    def generate(
        self, prompts: list[str], *, streams: Sequence[int] | None = None, listener: Listener | None = None
    ) -> list[Generation]:
        """Continue the prompts in one batch; the tokens and what they cost.

        `streams`: when sampling, the number of each prompt's own stream of random numbers, 0, 1, ... by default:
        the same number gives the same answer in any batch. Raises UserError.
        """
        tokens = [self.target.encode(prompt) for prompt in prompts]
        return self.generate_tokens(tokens, streams=streams, listener=listener)

    def generate_tokens(
        self,
        prompts: list[list[int]],
        *,
        streams: Sequence[int] | None = None,
        listener: Listener | None = None,
    ) -> list[Generation]:
        """`generate` for prompts that are token ids already."""
        return decode(
            self.target.runner,
            make_drafter(self.strategy, self.target.runner, **self.settings),
            prompts,
            max_new_tokens=self.max_new_tokens,
            eos_token_ids=self.target.eos_token_ids,
            stop=self.stop,
            rule=make_rule(self.target, self.choosing),
            streams=streams,
            listener=listener,
        )

    def text(self, generation: Generation, prompt: str = "") -> str:
        """The text of the new tokens, special tokens left out.

        With the prompt it is what follows that: some tokenizers begin a text without the space between the two.
        """
        stream = self._stream(prompt)
        return stream.push(generation.tokens) + stream.finish()

    def show(self, prompts: list[str], *, first_stream: int = 0) -> None:
        """Print the prompts with their continuations on standard output, and what it cost on standard error.

        One prompt is printed while it grows, and so are several on a terminal, one after another. Elsewhere
        several are one JSON object a line: prompt, text, finish_reason. Raises UserError.
        """
        streams = range(first_stream, first_stream + len(prompts))
        if len(prompts) == 1 or sys.stdout.isatty():
            generations = self._show_live(prompts, streams)
        else:
            generations = self.generate(prompts, streams=streams)
            for prompt, one in zip(prompts, generations, strict=True):
                row = {"prompt": prompt, "text": self.text(one, prompt), "finish_reason": one.finish_reason}
                print(json.dumps(row), flush=True)
        print(f"[{self.cost(generations)}]", file=sys.stderr)

    def cost(self, generations: list[Generation]) -> str:
        """What a batch cost, how its tokens were chosen and why its rows ended, in words."""
        tokens = sum(len(one.tokens) for one in generations)
        seconds = generations[0].prefill_seconds + generations[0].decode_seconds
        parts = [f"{len(generations)} prompts"] if len(generations) > 1 else []
        parts += [f"{tokens} tokens", f"{tokens / seconds:.1f} tokens/s"]
        drafted = sum(one.drafted for one in generations)
        if any(
            one.proposals_at for one in generations
        ):  # in a tree most drafts are alternatives to one another
            parts.append(f"acceptance rate {sum(one.accepted for one in generations) / drafted:.2f}")
        if drafted:
            lengths = [length for one in generations for length in one.accepted_lengths]
            parts.append(f"acceptance length {sum(lengths) / len(lengths):.2f}")
        if self.choosing.sample:
            parts.append(self._sampling())
        reasons = Counter(one.finish_reason for one in generations)
        ends = [reason if len(reasons) == 1 else f"{reason} ({rows})" for reason, rows in reasons.items()]
        return ", ".join([*parts, f"ended by {' and '.join(ends)}"])

    def _show_live(self, prompts: list[str], streams: Sequence[int]) -> list[Generation]:
        output = open_output(sys.stdout)
        several = len(prompts) > 1
        live = Live(
            output,
            [
                Page(f"{number} of {len(prompts)}" if several else "", prompt, self._stream(prompt))
                for number, prompt in enumerate(prompts, start=1)
            ],
        )
        try:
            generations = self.generate(prompts, streams=streams, listener=live)
            live.finish()
        except BaseException:  # an interruption most of all
            output.leave()
            raise
        return generations

    def _stream(self, prompt: str) -> TextStream:
        return TextStream(self.target.tokenizer, self.target.encode(prompt) if prompt else [])

    def _sampling(self) -> str:
        """The settings in force, the checkpoint's among them."""
        config = peer_config(self.target, self.choosing)
        shown = [f"{name} {config[name]}" for name in ("temperature", "top_k", "top_p")]
        return f"{self.choosing.in_words} with {', '.join(shown)}, seed {self.choosing.seed}"


def interact(generator: Generator) -> None:
    """Answer prompts line by line until the end of the input; a bad one is said and the next is read."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is a mistake in its own line only
    invitation = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    for number in count():
        try:
            prompt = input(invitation)
        except (EOFError, KeyboardInterrupt):
            return
        try:
            generator.show([prompt], first_stream=number)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
