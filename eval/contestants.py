"""The strategies of one benchmark, ours and transformers' own, behind one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from eval import peers
from eval.choosing import Choosing, make_rule
from eval.decoding.drafters.base import Drafter
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from eval.drafts import with_loaded_drafts
from eval.profile import Profile, profile_decode
from eval.strategy_spec import BASELINE, PEERS, Spec, peer_settings, settings_for
from eval.target import Target
from layerskip_model.runner import Runner

NOT_COMPILED = "_not_compiled"  # behind a name

Key = tuple[str, bool]
"""A contestant's name, and whether it samples."""


@dataclass(frozen=True)
class Contestant:
    """One row of a table. `decode` continues prompts in one batch, each with its stream of random numbers.

    `profile` does the same for its own strategies and says where the time goes.

    Attributes:
        name: that of its entry in `--strategies`, which no other row has; strategy: the strategy's alone.
        label: the strategy's name for people.
        settings: those in force, for a report: None and False are left out, a draft model is its name.
        variant: those of them that the entry gave.
        draws: whether it draws its tokens otherwise than the baseline does, place by place.
    """

    name: str
    strategy: str
    label: str
    settings: dict[str, Any]
    variant: tuple[str, ...]
    choosing: Choosing
    decode: peers.Decode
    draws: bool = True
    profile: Callable[[list[list[int]], list[int]], Profile] | None = None

    @property
    def ours(self) -> bool:
        """Whether the one loop decodes it."""
        return self.profile is not None

    @property
    def lossless(self) -> bool:
        """Whether the way of choosing tokens leaves its output, or its distribution, as the baseline's."""
        return self.choosing.lossless or not self.ours or self.strategy == BASELINE

    @property
    def same_tokens(self) -> bool:
        """Whether its token ids have to be the baseline's."""
        return not self.sampled or (self.lossless and not self.draws)

    @property
    def sampled(self) -> bool:
        """Whether it samples."""
        return self.choosing.sample

    @property
    def key(self) -> Key:
        """What tells it apart from the others of its benchmark."""
        return self.name, self.sampled


def make_contestant(
    spec: Spec, target: Target, max_new_tokens: int, given: dict[str, Any], choosing: Choosing | None = None
) -> Contestant:
    """The strategy of that entry, with those of the settings `given` for all that it takes; greedy by default.

    Raises UserError for missing or impossible settings, for a draft model that cannot draft, and for a generation
    config that cannot be honoured.
    """
    choosing = Choosing() if choosing is None else choosing
    peer = PEERS.get(spec.name)
    settings = with_loaded_drafts(target, peer.ours if peer else spec.name, settings_for(spec, target, given))
    if peer is not None:
        settings = peer_settings(spec.name, target, settings)
        decode_batch = peer.make(target, max_new_tokens, choosing, **settings)
        shown, variant = shown_settings(settings), tuple(spec.settings)
        return Contestant(str(spec), spec.name, peer.label, shown, variant, choosing, decode_batch)

    def new_drafter(runner: Runner) -> Drafter:
        return make_drafter(spec.name, runner, **settings)

    new_rule = partial(make_rule, target, choosing)
    drafter, _ = new_drafter(target.runner), new_rule()  # refused now, if at all
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_ids": target.eos_token_ids}
    runners = (target.runner, *drafter.own_runners)

    def run(prompts: list[list[int]], streams: list[int]) -> list[Generation]:
        """What was captured on the way would be in the time: such a decode is a warm-up, and another follows."""
        runner = target.runner
        while True:
            captures = [one.captures for one in runners]
            rows = decode(runner, new_drafter(runner), prompts, rule=new_rule(), streams=streams, **limits)
            if [one.captures for one in runners] == captures:
                return rows

    def profile(prompts: list[list[int]], streams: list[int]) -> Profile:
        return profile_decode(target.runner, new_drafter, new_rule, prompts, streams=streams, **limits)

    in_force = {one.name: getattr(drafter.settings, one.name) for one in dataclasses.fields(drafter.settings)}
    return Contestant(
        name=str(spec),
        strategy=spec.name,
        label=spec.name.replace("_", " "),
        settings=shown_settings(in_force),
        variant=tuple(spec.settings),
        choosing=choosing,
        decode=run,
        draws=drafter.draws,
        profile=profile,
    )


def shown_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as a report holds them: what is off is left out, what has a name, as a draft model, is its name."""
    return {
        key: getattr(value, "name", value)
        for key, value in settings.items()
        if value is not None and value is not False
    }


def not_compiled(contestant: Contestant) -> Contestant:
    """The same under the name of a twin, to stand beside one whose passes are captured."""
    label = f"{contestant.label}, not compiled"
    return dataclasses.replace(contestant, name=f"{contestant.name}{NOT_COMPILED}", label=label)
