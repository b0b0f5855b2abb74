"""The strategies of one benchmark, ours and transformers' own, behind one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

from eval import peers
from eval.choosing import Choosing, make_rule
from eval.decoding.drafters.base import Drafter
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import ALIASES, STRATEGIES, make_drafter
from eval.profile import Profile, profile_decode
from eval.target import Target
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner

PEERS: dict[str, tuple[Callable[..., peers.Decode], str, tuple[str, ...]]] = {
    "hf_generate": (peers.hf_generate, "transformers generate", ()),
    "hf_early_exit": (peers.hf_early_exit, "transformers early exit", ("exit_layer", "num_speculations")),
}
"""name -> (maker, label, settings it needs)"""
ONE_PROMPT_ONLY = {"hf_early_exit": "transformers drafts for one prompt at a time"}
"""Strategies that take part at batch size 1 only, and why."""


def contestant_name(name: str) -> str:
    """The name that a strategy has in a report, aliases resolved. Raises UserError for an unknown one."""
    known = [*STRATEGIES, *PEERS]
    found = ALIASES.get(name, name)
    if found not in known:
        close = get_close_matches(name, [*known, *ALIASES], n=1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        raise UserError(f"unknown strategy '{name}'{hint}; there are {', '.join(known)}")
    return found


NOT_COMPILED = "_not_compiled"  # behind a name

Key = tuple[str, bool]
"""A strategy's name, and whether it samples."""


@dataclass(frozen=True)
class Contestant:
    """One row of a table. `decode` continues prompts in one batch, each with its stream of random numbers.

    `profile` does the same for its own strategies and says where the time goes.
    """

    name: str
    label: str
    settings: dict[str, Any]
    choosing: Choosing
    decode: peers.Decode
    profile: Callable[[list[list[int]], list[int]], Profile] | None = None

    @property
    def ours(self) -> bool:
        """Whether the one loop decodes it."""
        return self.profile is not None

    @property
    def key(self) -> Key:
        """What tells it apart from the others of its benchmark."""
        return self.name, self.choosing.sample


def make_contestant(
    name: str, target: Target, max_new_tokens: int, given: dict[str, Any], choosing: Choosing | None = None
) -> Contestant:
    """The strategy of that name with those of the `given` settings that it takes; greedy by default.

    The baseline, autoregressive, always runs the whole model. Raises UserError for an unknown name, for
    missing or impossible settings, and for a generation config that cannot be honoured.
    """
    name = contestant_name(name)
    choosing = Choosing() if choosing is None else choosing
    if name in PEERS:
        make, label, needs = PEERS[name]
        missing = [key for key in needs if given.get(key) is None]
        if missing:
            raise UserError(f"{name} needs {missing[0]}; give --{missing[0]} a value")
        settings = {key: given[key] for key in needs}
        if needs:
            make_drafter("self_speculative", target.runner, **settings)  # the same settings, the same limits
        decode_batch = make(target, max_new_tokens, choosing, **settings)
        return Contestant(name, label, settings, choosing, decode_batch)
    fields = {field.name for field in dataclasses.fields(STRATEGIES[name].Settings)}
    settings = {key: value for key, value in given.items() if key in fields and value is not None}
    if name == "autoregressive":
        settings = {}

    def new_drafter(runner: Runner) -> Drafter:
        return make_drafter(name, runner, **settings)

    new_rule = partial(make_rule, target, choosing)
    drafter, _ = new_drafter(target.runner), new_rule()  # refused now, if at all
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_ids": target.eos_token_ids}

    def run(prompts: list[list[int]], streams: list[int]) -> list[Generation]:
        """What was captured on the way would be in the time: such a decode is a warm-up, and another follows."""
        runner = target.runner
        while True:
            captures = runner.captures
            rows = decode(runner, new_drafter(runner), prompts, rule=new_rule(), streams=streams, **limits)
            if runner.captures == captures:
                return rows

    def profile(prompts: list[list[int]], streams: list[int]) -> Profile:
        return profile_decode(target.runner, new_drafter, new_rule, prompts, streams=streams, **limits)

    shown = {key: value for key, value in dataclasses.asdict(drafter.settings).items() if value is not None}
    return Contestant(name, name.replace("_", " "), shown, choosing, run, profile)


def not_compiled(contestant: Contestant) -> Contestant:
    """The same under the name of a twin, to stand beside one whose passes are captured."""
    label = f"{contestant.label}, not compiled"
    return dataclasses.replace(contestant, name=f"{contestant.name}{NOT_COMPILED}", label=label)
