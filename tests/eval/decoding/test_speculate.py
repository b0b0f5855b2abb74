"""The loop: every strategy says what autoregressive decoding says, and ends every row where it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.decoding.speculate import Generation, Listener, decode
from eval.decoding.strategies import make_drafter
from layerskip_model.context import Context
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.tiny_models import agreeing_model, tiny_model

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17]]
AGREEING = Runner(agreeing_model())


def naive_greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """No cache, no batch: the argmax after the whole text, again and again."""
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


def run(runner: Runner, prompts: list[list[int]], strategy: str, **options: Any) -> list[Generation]:
    settings = {key: options.pop(key) for key in ("exit_layer", "num_speculations") if key in options}
    options = {"max_new_tokens": 16, "eos_token_ids": (), **options}
    return decode(runner, make_drafter(strategy, runner, **settings), prompts, **options)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "olmo2", "phi3"])
def test_autoregressive_equals_generate(kind: str) -> None:
    model = tiny_model(kind)
    expected = []
    for prompt in PROMPTS:
        output = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]), do_sample=False, max_new_tokens=16, pad_token_id=0
        )
        expected.append(output[0, len(prompt) :].tolist())
    together = run(Runner(model), PROMPTS, "autoregressive")
    alone = [run(Runner(model), [prompt], "autoregressive")[0] for prompt in PROMPTS]
    assert [row.tokens for row in together] == [row.tokens for row in alone] == expected
    for row in together:
        assert (row.target_forwards, row.accepted_lengths, row.drafted) == (15, [1] * 15, 0)
        assert row.finish_reason == "length"


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "qwen3"])
def test_self_speculation_is_lossless_on_random_models(kind: str) -> None:
    runner = Runner(tiny_model(kind))
    expected = [row.tokens for row in run(runner, PROMPTS, "autoregressive")]
    for exit_layer, drafts in ((1, 4), (3, 2)):
        settings = {"exit_layer": exit_layer, "num_speculations": drafts}
        assert [row.tokens for row in run(runner, PROMPTS, "self_speculative", **settings)] == expected


@pytest.mark.parametrize("drafts", [1, 3, 8])
@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_self_speculation_is_lossless_when_exits_agree(exit_layer: int, drafts: int) -> None:
    expected = [naive_greedy(AGREEING.model, prompt, 16) for prompt in PROMPTS]
    settings = {"exit_layer": exit_layer, "num_speculations": drafts}
    together = run(AGREEING, PROMPTS, "self_speculative", **settings)
    alone = [run(AGREEING, [prompt], "self_speculative", **settings)[0] for prompt in PROMPTS]
    assert [row.tokens for row in together] == [row.tokens for row in alone] == expected
    for row, single in zip(together, alone, strict=True):
        assert row.accepted_lengths == single.accepted_lengths
        assert (row.drafted, row.proposals_at) == (single.drafted, single.proposals_at)
        assert sum(row.accepted_lengths) == 15
        assert row.accepted == 15 - row.target_forwards == sum(row.accepted_at)
        assert row.drafted == sum(row.proposals_at)
        for index, accepted in enumerate(row.accepted_at):
            assert accepted == sum(length > index + 1 for length in row.accepted_lengths)
    assert sum(row.accepted for row in together) > 0.5 * sum(row.drafted for row in together)


def test_scalings_that_depend_on_length_stay_lossless() -> None:
    """The text outgrows the length up to which a dynamic rotary embedding is unscaled."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    runner = Runner(agreeing_model(max_position_embeddings=16, rope_parameters=rope))
    runner.context_length = 64
    expected = [row.tokens for row in run(runner, PROMPTS, "autoregressive")]
    drafted = run(runner, PROMPTS, "self_speculative", exit_layer=1, num_speculations=5)
    assert [row.tokens for row in drafted] == expected


def test_early_exit_decodes_with_the_first_layers() -> None:
    model = tiny_model()
    shallow = tiny_model()
    del shallow.get_decoder().layers[2:]
    shallow.config.num_hidden_layers = 2
    row = run(Runner(model), [PROMPTS[0]], "autoregressive", exit_layer=2)[0]
    assert row.tokens == naive_greedy(shallow, PROMPTS[0], 16)


def test_no_layer_runs_twice_for_a_token() -> None:
    """Rows that enter each layer: E-1 and below one by one, the others all in one pass."""
    rows: dict[int, list[int]] = {layer: [] for layer in range(4)}
    head = [0]

    class Recording(Runner):
        def run(self, hidden: Tensor, start: int, stop: int, context: Context) -> Tensor:
            for layer in range(start, stop):
                rows[layer].append(hidden.shape[1])
            return super().run(hidden, start, stop, context)

        def logits(self, hidden: Tensor) -> Tensor:
            head[0] += 1
            return super().logits(hidden)

    recording = Recording(AGREEING.model)
    head[0] = 0
    for calls in rows.values():
        calls.clear()
    row = run(recording, [PROMPTS[0]], "self_speculative", exit_layer=2, num_speculations=3)[0]
    drafts = []
    room = 15
    for won in row.accepted_lengths:
        drafts.append(min(3, room - 1))
        room -= won
    assert rows[0] == rows[1] == [len(PROMPTS[0])] + [1] * sum(count + 1 for count in drafts)
    assert rows[2] == rows[3] == [len(PROMPTS[0])] + [count + 1 for count in drafts]
    assert head[0] == 1 + sum(drafts) + len(drafts)  # the last draft's exit is not read


def cut_at(tokens: list[int], token: int) -> list[int]:
    return tokens[: tokens.index(token) + 1]


@pytest.mark.parametrize("place", [0, 1, 2, 5, 9])
def test_eos_inside_a_draft_ends_the_row_there(place: int) -> None:
    full = run(AGREEING, PROMPTS, "autoregressive")
    eos = full[0].tokens[place]
    drafted = run(
        AGREEING, PROMPTS, "self_speculative", exit_layer=1, num_speculations=6, eos_token_ids=[eos, 63]
    )
    for row, whole in zip(drafted, full, strict=True):
        ended = {eos, 63} & set(whole.tokens)
        assert row.finish_reason == ("eos" if ended else "length")
        ends = [index for index, token in enumerate(whole.tokens) if token in (eos, 63)]
        assert row.tokens == (whole.tokens[: ends[0] + 1] if ends else whole.tokens)
    assert drafted[0].tokens == cut_at(full[0].tokens, eos)
    # Counted as won, whatever is cut.
    assert sum(drafted[0].accepted_lengths) + 1 >= len(drafted[0].tokens)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_max_new_tokens_inside_a_draft(count: int) -> None:
    expected = [row.tokens[:count] for row in run(AGREEING, PROMPTS, "autoregressive")]
    settings = {"exit_layer": 1, "num_speculations": 6, "max_new_tokens": count}
    rows = run(AGREEING, PROMPTS, "self_speculative", **settings)
    assert [row.tokens for row in rows] == expected
    for row in rows:
        assert row.finish_reason == "length"
        assert sum(row.accepted_lengths) == count - 1  # no draft goes beyond the room


@pytest.mark.parametrize("strategy", ["autoregressive", "self_speculative"])
def test_the_context_limit_inside_a_draft(strategy: str) -> None:
    runner = Runner(agreeing_model(max_position_embeddings=12))
    settings = {"exit_layer": 1, "num_speculations": 6} if strategy == "self_speculative" else {}
    expected = [row.tokens for row in run(AGREEING, PROMPTS, "autoregressive")]
    rows = run(runner, PROMPTS, strategy, max_new_tokens=9, **settings)
    assert [len(row.tokens) for row in rows] == [5, 9, 7]  # prompt + new = 12, or 9 new tokens
    assert [row.finish_reason for row in rows] == ["context", "length", "context"]
    assert all(row.tokens == whole[: len(row.tokens)] for row, whole in zip(rows, expected, strict=True))


def test_a_stop_inside_a_draft_ends_the_row_there() -> None:
    full = run(AGREEING, PROMPTS, "autoregressive")
    pair = full[1].tokens[4:6]  # straddles two tokens

    def stop(tokens: list[int]) -> bool:
        return tokens[-2:] == pair

    for settings in ({}, {"exit_layer": 1, "num_speculations": 6}):
        strategy = "self_speculative" if settings else "autoregressive"
        rows = run(AGREEING, PROMPTS, strategy, stop=stop, **settings)
        for row, whole in zip(rows, full, strict=True):
            ends = [end for end in range(2, 17) if whole.tokens[end - 2 : end] == pair]
            assert row.finish_reason == ("stop" if ends else "length")
            assert row.tokens == whole.tokens[: ends[0] if ends else 16]
        assert rows[1].finish_reason == "stop"


class Recorder(Listener):
    """Notes what it is told."""

    wants_drafts = True

    def __init__(self) -> None:
        self.events: list[tuple[str, int, list[int]]] = []

    def drafted(self, row: int, tokens: list[int]) -> None:
        self.events.append(("drafted", row, tokens))

    def emitted(self, row: int, tokens: list[int]) -> None:
        self.events.append(("emitted", row, tokens))


def test_a_listener_hears_every_draft_and_every_token_once() -> None:
    listener = Recorder()
    rows = run(
        AGREEING,
        PROMPTS,
        "self_speculative",
        exit_layer=1,
        num_speculations=4,
        eos_token_ids=[run(AGREEING, PROMPTS, "autoregressive")[1].tokens[3]],
        listener=listener,
    )
    for index, row in enumerate(rows):
        mine = [(kind, tokens) for kind, to, tokens in listener.events if to == index]
        assert [token for kind, tokens in mine if kind == "emitted" for token in tokens] == row.tokens
        drafts = [tokens for kind, tokens in mine if kind == "drafted"]
        assert sum(map(len, drafts)) == row.drafted
        # What is emitted after a draft is its accepted part and one token more, or less of it at the end.
        for (_, draft), (kind, won) in zip(mine[1::2], mine[2::2], strict=False):
            assert kind == "emitted"
            assert draft[: len(won) - 1] == won[:-1]
    assert all(row.prefill_seconds > 0 and row.decode_seconds > 0 for row in rows)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[1], []], 4, "prompt 1 is empty"),
        ([[1] * 12], 4, "prompt 0 has 12 tokens and the model's context is 12; shorten the prompt to 11"),
        ([[64]], 4, "prompt 0 has token 64 and the model's vocabulary 64"),
        ([[1, -1]], 4, "prompt 0 has token -1"),
        ([[1]], 0, "max_new_tokens=0"),
    ],
)
def test_impossible_requests_are_refused(prompts: list[list[int]], count: int, message: str) -> None:
    runner = Runner(tiny_model(max_position_embeddings=12))
    with pytest.raises(UserError) as caught:
        run(runner, prompts, "autoregressive", max_new_tokens=count)
    assert message in str(caught.value)


def test_no_prompts_no_generations() -> None:
    assert run(AGREEING, [], "autoregressive") == []
