"""Where a decoding step's time goes, and how much of it is more than the bare forwards.

Nothing in the loop knows about it: the runner, the drafter, the rule and the cache of one decode are replaced by
twins that keep time. The forwards are noted with their arguments and run again back to back afterwards, with
nothing between them: that is the least such a decode can take.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eval.clock import now
from eval.decoding.acceptance import Outcome, Rule
from eval.decoding.drafters.base import Drafter, State
from eval.decoding.speculate import decode
from eval.decoding.tree import Draft
from layerskip_model.runner import Forward, Runner

PHASES = ("draft forwards", "verify forward", "choosing drafts", "acceptance", "cache")


@dataclass
class Profile:
    """Seconds of a decode after its prefill.

    Attributes:
        steps: verifications.
        seconds: of each phase, measured with the device synchronised at every boundary.
        total: of the instrumented decode. What the phases leave of it is Python: the drafter's, the loop's.
        plain: of the same decode without instruments.
        bare: of its forwards alone.
    """

    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    total: float = 0.0
    plain: float = 0.0
    bare: float = 0.0

    @property
    def python(self) -> float:
        """What is left of the instrumented decode."""
        return self.total - sum(self.seconds.values())

    @property
    def overhead(self) -> float:
        """How much longer the decode takes than its forwards: 0.1 is ten percent."""
        return self.plain / self.bare - 1.0

    def __add__(self, other: Profile) -> Profile:
        return Profile(
            self.steps + other.steps,
            {phase: self.seconds[phase] + other.seconds[phase] for phase in PHASES},
            self.total + other.total,
            self.plain + other.plain,
            self.bare + other.bare,
        )


def profile_decode(
    runner: Runner,
    make_drafter: Callable[[Runner], Drafter],
    make_rule: Callable[[], Rule],
    prompts: list[list[int]],
    **options: Any,
) -> Profile:
    """Decode once as always, once with instruments, and run the forwards of the latter once more.

    `options` are those of `decode`, which is asked for the same tokens both times.
    """
    plain = decode(runner, make_drafter(runner), prompts, rule=make_rule(), **options)
    clock = _Clock(runner)
    drafter = make_drafter(clock.runner)
    rule = _TimedRule(make_rule(), clock)
    with clock.watching(drafter):
        rows = decode(clock.runner, drafter, prompts, rule=rule, **options)
    del rule.cache.keep  # the cache may be kept for other decodes
    assert [row.tokens for row in rows] == [row.tokens for row in plain]
    profile = clock.profile
    profile.steps = max(row.target_forwards for row in rows)
    profile.plain, profile.total = plain[0].decode_seconds, rows[0].decode_seconds
    profile.bare = clock.replay()
    return profile


class _Clock:
    """Twins that keep time of a runner and a drafter."""

    def __init__(self, runner: Runner) -> None:
        self.profile = Profile()
        self.device = runner.device
        self.phase = "verify forward"
        self.decoding = False  # the prefill does not count
        self.forwards: list[Callable[[], Forward]] = []
        self.runner = copy.copy(runner)
        self.forward = runner.forward
        self.runner.forward = self._forward  # type: ignore[method-assign]

    def timed(self, phase: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`work(...)`, its time added to a phase."""
        began = now(self.device)
        result = work(*args, **kwargs)
        if self.decoding:
            self.profile.seconds[phase] += now(self.device) - began
        return result

    @contextmanager
    def watching(self, drafter: Drafter) -> Iterator[None]:
        """Keep a drafter's time, its forwards told from the verification's; all that its own runners do is drafting.

        The drafter is ours alone; its own runners are others' too, and are left as they were.
        """
        propose = drafter.propose

        def timed_propose(state: State) -> Draft:
            self.decoding, self.phase = True, "draft forwards"
            draft = propose(state)
            self.phase = "verify forward"
            return draft

        drafter.propose = timed_propose  # type: ignore[method-assign]
        for own in drafter.own_runners:
            forward = partial(self._timed_forward, own.forward, "draft forwards")
            own.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            for own in drafter.own_runners:
                del own.forward

    def _forward(self, *args: Any, **kwargs: Any) -> Forward:
        return self._timed_forward(self.forward, self.phase, *args, **kwargs)

    def _timed_forward(
        self, forward: Callable[..., Forward], phase: str, *args: Any, **kwargs: Any
    ) -> Forward:
        if self.decoding:
            self.forwards.append(partial(forward, *args, **kwargs))
        return self.timed(phase, forward, *args, **kwargs)

    @torch.inference_mode()
    def replay(self) -> float:
        """Seconds of the forwards noted, one right after the other."""
        began = now(self.device)
        for forward in self.forwards:
            forward()
        return now(self.device) - began


class _TimedRule(Rule):
    """A rule that keeps time, and has the cache keep it too."""

    def __init__(self, rule: Rule, clock: _Clock) -> None:
        self.rule = rule
        self.clock = clock

    def begin(self, state: State) -> None:
        self.rule.begin(state)
        self.cache = state.cache
        keep = self.cache.keep

        def timed_keep(path: list[list[int]], slot: Tensor | None = None) -> None:
            self.clock.timed("cache", keep, path, slot)

        self.cache.keep = timed_keep  # type: ignore[method-assign]

    def preferences(self, state: State, logits: Tensor, draft: Draft) -> Tensor:
        return self.clock.timed("choosing drafts", self.rule.preferences, state, logits, draft)

    def first_choice(self, state: State, logits: Tensor, tokens: list[Tensor]) -> Tensor:
        return self.clock.timed("choosing drafts", self.rule.first_choice, state, logits, tokens)

    def draft(self, state: State, logits: Tensor, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        return self.clock.timed("choosing drafts", self.rule.draft, state, logits, tokens)

    def accept(self, state: State, logits: Tensor, draft: Draft) -> Outcome:
        return self.clock.timed("acceptance", self.rule.accept, state, logits, draft)
