"""A separate draft model: lossless, and no worse a drafter for its cache than without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.decoding import sampling
from eval.decoding.capture import CompiledRunner, GraphRunner
from eval.decoding.drafters.base import State
from eval.decoding.drafters.speculative_sampling import DraftModel, SpeculativeSampling, fitted
from eval.decoding.shaping import Shaping
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from eval.decoding.tree import Draft
from layerskip_model.context import Context
from layerskip_model.errors import UserError
from layerskip_model.runner import Forward, Runner
from tests.eval.decoding.drafts import draft_of, first_layers, naive_lengths
from tests.eval.decoding.sampled import DECISIVE, LOWEST, draws, p_value, sampled_model, text_probabilities
from tests.eval.decoding.sampled import sampling as sampling_rule
from tests.eval.decoding.test_speculate import PROMPTS, naive_greedy
from tests.tiny_models import agreeing_model, tiny_model

NEW = 20
TARGET = Runner(agreeing_model(layers=2, scale=0.2))
DRAFT = draft_of(TARGET.model, 2)
EXPECTED = [naive_greedy(TARGET.model, prompt, NEW) for prompt in PROMPTS]
SAMPLED = Runner(sampled_model())
SETTINGS = {"temperature": 0.7, "top_k": 5}
PROBABILITIES = text_probabilities(SAMPLED.model, SETTINGS)


def run(
    draft: DraftModel, prompts: list[list[int]], drafts: int, runner: Runner = TARGET, **options: Any
) -> list[Generation]:
    drafter = make_drafter("speculative_sampling", runner, draft=draft, num_speculations=drafts)
    return decode(runner, drafter, prompts, **{"max_new_tokens": NEW, "eos_token_ids": (), **options})


def check(rows: list[Generation], draft: DraftModel, drafts: int) -> None:
    """The target's own text, in as few steps as a draft model without a cache takes."""
    assert [row.tokens for row in rows] == EXPECTED
    for row, prompt, future in zip(rows, PROMPTS, EXPECTED, strict=True):
        assert row.accepted_lengths == naive_lengths(draft, prompt, future, drafts)


@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_greedy_is_lossless_alone_and_in_a_batch(drafts: int) -> None:
    rows = run(DRAFT, PROMPTS, drafts)
    check(rows, DRAFT, drafts)
    check([run(DRAFT, [prompt], drafts)[0] for prompt in PROMPTS], DRAFT, drafts)
    assert {length for row in rows for length in row.accepted_lengths} >= {1, drafts + 1}


def test_the_first_layers_draft_as_in_self_speculation() -> None:
    drafter = make_drafter("self_speculative", TARGET, exit_layer=2, num_speculations=3)
    rows = decode(TARGET, drafter, PROMPTS, max_new_tokens=NEW, eos_token_ids=())
    assert [row.accepted_lengths for row in run(DRAFT, PROMPTS, 3)] == [row.accepted_lengths for row in rows]


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_models_of_other_kinds(kind: str) -> None:
    """A draft model with sliding windows, that has nothing in common with the target."""
    draft = DraftModel("other", Runner(tiny_model(kind, num_hidden_layers=2)))
    check(run(draft, PROMPTS, 3), draft, 3)


@pytest.mark.parametrize("vocabulary", [50, 80])
def test_logits_of_other_widths(vocabulary: int) -> None:
    """Fewer tokens than the target's, so that it says some that the draft model does not know; and more."""
    draft = draft_of(TARGET.model, 2, vocabulary=vocabulary)
    rows = run(draft, PROMPTS, 3)
    assert [row.tokens for row in rows] == EXPECTED
    assert sum(row.accepted for row in rows) > 5
    if vocabulary == 50:
        assert max(max(tokens) for tokens in EXPECTED) >= vocabulary


def test_fitted_logits() -> None:
    logits = torch.tensor([[1.0, 2.0]])
    assert fitted(logits, 1).tolist() == [[1.0]]
    assert fitted(logits, 2).tolist() == [[1.0, 2.0]]
    wider = fitted(logits, 4)
    assert wider.softmax(-1)[0, 2:].tolist() == [0.0, 0.0]
    assert torch.equal(wider[:, :2], logits)


@pytest.mark.parametrize("context", [4, 8, 12, 19])
def test_beyond_the_draft_models_context_decoding_goes_on_without(context: int) -> None:
    """Its end lies before a prompt's, between those of the prompts and in the new text."""
    draft = DraftModel("short", Runner(first_layers(TARGET.model, 2)))
    draft.runner.context_length = context
    check(run(draft, PROMPTS, 4), draft, 4)
    check(run(draft, PROMPTS, 4, GraphRunner(TARGET)), draft, 4)


def test_the_targets_own_context_ends_a_row() -> None:
    runner = Runner(agreeing_model(layers=2, scale=0.2, max_position_embeddings=14))
    rows = run(DRAFT, PROMPTS, 4, runner)
    assert [row.finish_reason for row in rows] == ["context"] * 3
    assert [row.tokens for row in rows] == [
        tokens[: 14 - len(prompt)] for tokens, prompt in zip(EXPECTED, PROMPTS, strict=True)
    ]


def test_a_row_that_ends_leaves_the_others_alone() -> None:
    end = EXPECTED[1][3]
    rows = run(DRAFT, PROMPTS, 3, eos_token_ids=[end])
    for row, tokens in zip(rows, EXPECTED, strict=True):
        assert row.tokens == (tokens[: tokens.index(end) + 1] if end in tokens else tokens)
    assert rows[1].finish_reason == "eos"


def test_one_pass_a_draft_and_no_token_twice_but_where_one_was_missing() -> None:
    passes: list[int] = []

    class Recording(Runner):
        def forward(self, inputs: Tensor, start: int, stop: int, context: Context, **options: Any) -> Forward:
            passes.append(inputs.shape[1])
            return super().forward(inputs, start, stop, context, **options)

    draft = DraftModel("recorded", Recording(DRAFT.runner.model))
    passes.clear()
    row = run(draft, [PROMPTS[0]], 3)[0]
    room, expected, lacks = NEW - 1, [len(PROMPTS[0])], False
    for won in row.accepted_lengths:
        drafts = min(3, room - 1)
        if drafts:
            expected += [2 if lacks else 1] + [1] * (drafts - 1)
        lacks, room = won == drafts + 1, room - won
    assert passes == expected
    assert 2 in passes


@pytest.mark.parametrize("capture", [GraphRunner, CompiledRunner])
def test_captured_passes_give_the_same_tokens(capture: type[Runner]) -> None:
    if capture is CompiledRunner:  # one layer and one prompt, as compiling takes its time
        plain = Runner(agreeing_model(num_hidden_layers=1))
        draft, prompts = draft_of(plain.model, 1), PROMPTS[:1]
    else:
        plain, draft, prompts = TARGET, DRAFT, PROMPTS
    expected = run(draft, prompts, 2, plain)
    runners = capture(plain), capture(draft.runner)  # type: ignore[arg-type]
    for _ in range(2):  # the second time on kept caches
        rows = run(DraftModel("captured", runners[1]), prompts, 2, runners[0])
        assert [row.tokens for row in rows] == [row.tokens for row in expected]
        assert [row.accepted_lengths for row in rows] == [row.accepted_lengths for row in expected]
    assert runners[1].captures == 2  # of one token, and of two


@pytest.mark.parametrize(
    ("settings", "vocabulary"), [(SETTINGS, 6), ({"temperature": 1.3, "top_p": 0.8}, 5)], ids=str
)
def test_texts_follow_the_targets_distribution(settings: dict[str, Any], vocabulary: int) -> None:
    draft = draft_of(SAMPLED.model, 1, vocabulary=vocabulary)
    tokens = draws(SAMPLED, "speculative_sampling", sampling_rule(settings), draft=draft, num_speculations=2)
    assert p_value(tokens, text_probabilities(SAMPLED.model, settings)) > LOWEST


def test_a_sampled_row_depends_on_its_stream_and_not_on_its_batch() -> None:
    def sampled(prompts: list[list[int]], streams: list[int]) -> list[Generation]:
        rule = sampling.Sampling(Shaping({"temperature": 0.8}, (), TARGET.vocab_size), 1)
        return run(DRAFT, prompts, 3, rule=rule, streams=streams)

    together = sampled(PROMPTS, [5, 0, 9])
    for row, prompt, stream in zip(together, PROMPTS, [5, 0, 9], strict=True):
        alone = sampled([prompt], [stream])[0]
        assert (row.tokens, row.accepted_lengths) == (alone.tokens, alone.accepted_lengths)
    assert 0 < sum(row.accepted for row in together) < sum(row.drafted for row in together)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "speculative_sampling needs draft: the directory or hub name of a smaller model"),
        ({"draft": "somewhere"}, "draft='somewhere' is not valid; give the directory or hub name"),
        ({"draft": DRAFT, "num_speculations": 0}, "num_speculations=0 is not valid"),
        ({"draft": DRAFT, "exit_layer": 1}, "speculative_sampling has no setting 'exit_layer'"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_drafter("speculative_sampling", TARGET, **settings)


Plant = Callable[[pytest.MonkeyPatch], None]


def is_lossless() -> bool:
    """With a draft model that is not the target's first layers to the last number."""
    other = first_layers(TARGET.model, 2)
    for layer in other.get_decoder().layers:
        layer.self_attn.v_proj.weight.data *= 0.8
    return [row.tokens for row in run(DraftModel("other", Runner(other)), PROMPTS, 3)] == EXPECTED


def drafts_as_well_as_without_a_cache() -> bool:
    rows = run(DRAFT, PROMPTS, 3)
    return [row.accepted_lengths for row in rows] == [
        naive_lengths(DRAFT, prompt, future, 3) for prompt, future in zip(PROMPTS, EXPECTED, strict=True)
    ]


def sampling_p_value() -> float:
    draft = draft_of(SAMPLED.model, 1)
    rule = sampling_rule(SETTINGS)
    tokens = draws(SAMPLED, "speculative_sampling", rule, rows=5000, draft=draft, num_speculations=2)
    return p_value(tokens, PROBABILITIES)


def wrapped(name: str, after: Callable[..., Any]) -> Plant:
    """A method of the drafter whose result (and state) `after` changes."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        method = getattr(SpeculativeSampling, name)

        def wrong(self: SpeculativeSampling, *args: Any, **kwargs: Any) -> Any:
            return after(self, method(self, *args, **kwargs), *args)

        patch.setattr(SpeculativeSampling, name, wrong)

    return plant


def one_cache_for_both(self: SpeculativeSampling, _: None, state: State, *__: Any) -> None:
    """The draft model writes its keys and values over the target's."""
    self._behind.cache.keys, self._behind.cache.values = state.cache.keys, state.cache.values


def root_again(self: SpeculativeSampling, draft: Draft, state: State) -> Draft:
    """The token before the last one is the root."""
    before = torch.tensor([[text[-2]] for text in state.texts])
    return replace(draft, tokens=torch.cat([before, draft.tokens[:, 1:]], dim=1))


def forget(self: SpeculativeSampling, *_: Any) -> None:
    """The last draft is never run by the draft model."""
    self._lacks_a_token = False


def q_of_the_place_before(self: SpeculativeSampling, draft: Draft, state: State) -> Draft:
    return draft if draft.q is None else replace(draft, q=draft.q.roll(1, dims=1))


def likeliest(self: SpeculativeSampling, draft: Draft, state: State) -> Draft:
    """Drafts are the likeliest tokens and are said to be drawn."""
    if draft.q is None:
        return draft
    return replace(draft, tokens=torch.cat([draft.tokens[:, :1], draft.q.argmax(dim=-1)], dim=1))


def q_before_shaping(patch: pytest.MonkeyPatch) -> None:
    draft = sampling.Sampling.draft

    def wrong(self: Any, state: State, logits: Tensor, tokens: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return draft(self, state, logits, tokens)[0], logits.softmax(dim=-1)

    patch.setattr(sampling.Sampling, "draft", wrong)


def test_without_bugs_the_checks_are_content() -> None:
    assert is_lossless()
    assert drafts_as_well_as_without_a_cache()


@pytest.mark.parametrize("bug", [wrapped("start", one_cache_for_both), wrapped("propose", root_again)])
def test_greedy_equality_reports(bug: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    assert not is_lossless()


def test_the_twin_without_a_cache_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped("advance", forget)(monkeypatch)
    assert is_lossless()
    assert not drafts_as_well_as_without_a_cache()


@pytest.mark.parametrize(
    "bug", [wrapped("propose", q_of_the_place_before), wrapped("propose", likeliest), q_before_shaping]
)
def test_the_chi_square_reports(bug: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    assert sampling_p_value() < DECISIVE
