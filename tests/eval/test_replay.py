"""Acceptance read off a text that the model wrote is that of a real decode, for every exit and number of drafts."""

from __future__ import annotations

from typing import Any

import pytest

from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from eval.replay import OwnText, mean_accepted
from layerskip_model.runner import Runner
from tests.tiny_models import agreeing_model

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 20, 41]]
NEW_TOKENS = 40


def decoded(runner: Runner, name: str, **settings: Any) -> list[Generation]:
    drafter = make_drafter(name, runner, **settings)
    return decode(runner, drafter, PROMPTS, max_new_tokens=NEW_TOKENS, eos_token_ids=[])


def own_text(runner: Runner) -> OwnText:
    texts = [generation.tokens for generation in decoded(runner, "autoregressive")]
    return OwnText(runner, PROMPTS, texts, [False] * 3)


def mean_of_whole_rounds(generations: list[Generation], drafts: int) -> float:
    """Drafts accepted in rounds that the end of the text does not cut short."""
    accepted = []
    for generation in generations:
        begin = 1  # the first token comes with the prompt
        for length in generation.accepted_lengths:
            if begin + drafts < NEW_TOKENS:  # the last token is never drafted
                accepted.append(length - 1)
            begin += length
    return sum(accepted) / len(accepted)


@pytest.mark.parametrize(("kind", "fuse"), [("llama", True), ("llama", False), ("mistral", False)])
def test_a_replay_is_the_decode(kind: str, fuse: bool) -> None:
    runner = Runner(agreeing_model(kind, scale=0.25), fuse=fuse)
    assert (runner.fused is not None) == fuse
    written = own_text(runner)
    agreement = written.agreement()
    assert list(agreement) == [1, 2, 3]
    assert [len(bits) for bits in agreement[1]] == [NEW_TOKENS - 1] * 3
    means = set()
    for exit_layer, agreed in agreement.items():
        for drafts in (1, 2, 5):
            real = decoded(runner, "self_speculative", exit_layer=exit_layer, num_speculations=drafts)
            assert [generation.tokens for generation in real] == written.texts
            mean = mean_accepted([text[:-1] for text in agreed], written.ended, drafts)
            assert mean == pytest.approx(mean_of_whole_rounds(real, drafts))
            means.add(round(mean, 3))
    assert len(means) > 3
    assert 0.05 < mean_accepted(agreement[1], written.ended, 5) < 4.9


def test_rounds_by_hand() -> None:
    text = [True, True, False, True, True, True, True, False, True]
    # two drafts: TT (then F is the last layer's own), TT, T F, and one place is left
    assert mean_accepted([text], [False], 2) == pytest.approx((2 + 2 + 1) / 3)
    assert mean_accepted([text], [False], 4) == pytest.approx((2 + 4) / 2)
    # ... and where the text ends by itself the last round is worth what it finds
    assert mean_accepted([text], [True], 4) == pytest.approx((2 + 4 + 1) / 3)
    # ... of which the second text has none that is whole
    assert mean_accepted([text, [False]], [False, False], 4) == pytest.approx((2 + 4) / 2)
    assert mean_accepted([[True, True]], [False], 4) == 2.0
    assert mean_accepted([[], []], [True, False], 4) == 0.0


def test_unfused_layers_keep_their_weights_where_they_are() -> None:
    model = agreeing_model()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    runner = Runner(model, fuse=False)
    own_text(runner)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    Runner(model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} != before


def test_texts_that_end_by_themselves() -> None:
    """The same with an end-of-sequence token: whatever is accepted before it counts, and nothing after it."""
    runner = Runner(agreeing_model(scale=0.25))
    text = decoded(runner, "autoregressive")[2].tokens
    eos = text[17]
    place = text.index(eos)
    prompts = PROMPTS[2:]
    agreement = OwnText(runner, prompts, [text[: place + 1]], [True]).agreement()
    for drafts in (1, 2, 5, 12):
        drafter = make_drafter("self_speculative", runner, exit_layer=1, num_speculations=drafts)
        (real,) = decode(runner, drafter, prompts, max_new_tokens=100, eos_token_ids=[eos])
        assert real.tokens == text[: place + 1]
        lengths = list(real.accepted_lengths)
        beyond = 1 + sum(lengths) - len(real.tokens)  # accepted in the last round, and cut off
        # The last round may end at the eos itself, a draft, and then has no token of the last layer's own.
        accepted = sum(length - 1 for length in lengths) - beyond + (beyond > 0)
        assert mean_accepted(agreement[1], [True], drafts) == pytest.approx(accepted / len(lengths))
