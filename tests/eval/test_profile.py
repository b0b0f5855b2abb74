"""Where a step's time goes: every part is there, the forwards are run again, and nothing stays behind."""

from __future__ import annotations

import pytest
from torch import Tensor

from eval.decoding.acceptance import Greedy
from eval.decoding.capture import GraphRunner
from eval.decoding.drafters.base import Drafter
from eval.decoding.drafters.speculative_sampling import DraftModel, SpeculativeSampling
from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.profile import PHASES, Profile, _Clock, profile_decode
from layerskip_model.runner import Runner
from tests.tiny_models import agreeing_model

PROMPTS = [[3, 4, 5, 6, 7], [8, 9, 10]]
RUNNER = Runner(agreeing_model())


def self_speculative(runner: Runner) -> Drafter:
    return make_drafter("self_speculative", runner, exit_layer=1, num_speculations=3)


def test_every_phase_is_timed_and_the_parts_are_the_whole() -> None:
    options = {"max_new_tokens": 12, "eos_token_ids": ()}
    profile = profile_decode(RUNNER, self_speculative, Greedy, PROMPTS, **options)
    rows = decode(RUNNER, self_speculative(RUNNER), PROMPTS, **options)  # type: ignore[arg-type]
    assert profile.steps == max(row.target_forwards for row in rows)
    assert set(profile.seconds) == set(PHASES)
    assert all(seconds > 0 for seconds in profile.seconds.values())
    assert profile.total == pytest.approx(sum(profile.seconds.values()) + profile.python)
    assert profile.python > 0
    assert profile.overhead == pytest.approx(profile.plain / profile.bare - 1)


def test_without_drafts_there_are_no_draft_forwards() -> None:
    profile = profile_decode(
        RUNNER, lambda runner: make_drafter("autoregressive", runner), Greedy, PROMPTS[:1], max_new_tokens=5,
        eos_token_ids=(),
    )  # fmt: skip
    assert profile.steps == 4
    assert profile.seconds["draft forwards"] == profile.seconds["choosing drafts"] == 0.0


def test_the_forwards_after_the_prefill_are_run_again_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, int, int]] = []  # rows, first and last layer
    forward = Runner.forward

    def noting(self, inputs, start, stop, context, **how):  # type: ignore[no-untyped-def]
        passes.append((inputs.shape[1], start, stop))
        return forward(self, inputs, start, stop, context, **how)

    monkeypatch.setattr(Runner, "forward", noting)
    clock = _Clock(RUNNER)
    drafter = self_speculative(clock.runner)
    with clock.watching(drafter):
        decode(clock.runner, drafter, PROMPTS, max_new_tokens=9, eos_token_ids=())
    made = list(passes)
    passes.clear()
    clock.replay()
    assert passes == made
    assert (1, 0, 1) in made
    assert (4, 1, 4) in made


def test_a_draft_models_forwards_are_drafting() -> None:
    own = Runner(agreeing_model())
    counted: list[int] = []

    class Counting(SpeculativeSampling):
        def _run(self, tokens: Tensor, first: int, *, head: bool = True) -> Tensor:
            counted.append(tokens.shape[1])
            return super()._run(tokens, first, head=head)

    settings = SpeculativeSampling.Settings(DraftModel("small", own), 3)
    clock = _Clock(RUNNER)
    drafter = Counting(clock.runner, settings)
    with clock.watching(drafter):
        rows = decode(clock.runner, drafter, PROMPTS[:1], max_new_tokens=12, eos_token_ids=())
    assert (
        len(clock.forwards) == len(counted) - 1 + rows[0].target_forwards
    )  # all but the draft model's prefill
    assert clock.profile.seconds["draft forwards"] > 0
    assert clock.replay() > 0
    assert "forward" not in vars(own)
    profile = profile_decode(
        RUNNER, lambda runner: SpeculativeSampling(runner, settings), Greedy, PROMPTS, max_new_tokens=12,
        eos_token_ids=(),
    )  # fmt: skip
    assert profile.seconds["draft forwards"] > 0


def test_a_kept_cache_is_left_as_it_was() -> None:
    graphs = GraphRunner(RUNNER)
    for _ in range(2):
        profile_decode(graphs, self_speculative, Greedy, PROMPTS[:1], max_new_tokens=6, eos_token_ids=())
    assert "keep" not in vars(graphs._caches[1])
    assert "forward" not in vars(graphs)


def test_profiles_add_up() -> None:
    one = Profile(2, dict.fromkeys(PHASES, 0.5), total=4.0, plain=3.0, bare=2.0)
    both = one + Profile(1, dict.fromkeys(PHASES, 0.25), total=2.0, plain=1.5, bare=1.0)
    assert (both.steps, both.total, both.plain, both.bare) == (3, 6.0, 4.5, 3.0)
    assert both.seconds == dict.fromkeys(PHASES, 0.75)
    assert both.python == pytest.approx(6.0 - 0.75 * len(PHASES))
    assert both.overhead == pytest.approx(0.5)
