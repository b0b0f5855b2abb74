"""Shaping against transformers' own `generate`, and every node of a tree against its own text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from eval.decoding.acceptance import Greedy
from eval.decoding.drafters.base import State
from eval.decoding.shaping import PROCESSORS, WARPERS, Shaping, node_paths
from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.decoding.tree import Draft
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.tiny_models import agreeing_model

RUNNER = Runner(agreeing_model())
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17]]
NEW = 20
STRATEGIES: list[tuple[str, dict[str, int]]] = [
    ("autoregressive", {}),
    ("self_speculative", {"exit_layer": 1, "num_speculations": 4}),
]


def generated(prompt: list[int], settings: dict[str, Any], eos: int | None) -> list[int]:
    """What transformers continues a prompt with, greedily."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0, **settings
    )
    output = RUNNER.model.generate(torch.tensor([prompt]), generation_config=config)  # type: ignore[operator]
    return output[0, len(prompt) :].tolist()


def shaped_greedy(
    prompts: list[list[int]], settings: dict[str, Any], eos: int | None, strategy: tuple[str, dict[str, int]]
) -> list[list[int]]:
    name, drafting = strategy
    ids = [] if eos is None else [eos]
    rule = Greedy(Shaping(settings, ids, RUNNER.vocab_size))
    drafter = make_drafter(name, RUNNER, **drafting)
    rows = decode(RUNNER, drafter, prompts, max_new_tokens=NEW, eos_token_ids=ids, rule=rule)
    return [row.tokens for row in rows]


PLAIN = [generated(prompt, {}, None) for prompt in PROMPTS]
EOS = PLAIN[0][2]  # ends the first row early
USUAL = max(
    {token for row in PLAIN for token in row}, key=lambda token: sum(row.count(token) for row in PLAIN)
)
CASES: list[tuple[dict[str, Any], int | None]] = [
    ({"repetition_penalty": 1.6}, None),
    ({"repetition_penalty": 0.7}, None),
    ({"no_repeat_ngram_size": 2}, None),
    ({"bad_words_ids": [[USUAL], PLAIN[1][4:6], PLAIN[2][1:4]]}, None),
    ({"sequence_bias": [[[USUAL], -2.0], [PLAIN[0][3:5], -9.0]]}, None),
    ({"suppress_tokens": [USUAL, PLAIN[1][0]]}, None),
    ({"begin_suppress_tokens": [row[0] for row in PLAIN]}, None),
    ({"min_length": 14}, EOS),
    ({"min_new_tokens": 6}, EOS),
    ({"exponential_decay_length_penalty": (2, 1.5)}, EOS),
    ({"remove_invalid_values": True, "suppress_tokens": [USUAL]}, None),
    (
        {"repetition_penalty": 1.3, "min_length": 12, "suppress_tokens": [USUAL], "no_repeat_ngram_size": 3},
        EOS,
    ),
]


@pytest.mark.parametrize(("settings", "eos"), CASES, ids=str)
def test_greedy_tokens_are_those_of_generate(settings: dict[str, Any], eos: int | None) -> None:
    expected = [generated(prompt, settings, eos) for prompt in PROMPTS]
    assert expected != [generated(prompt, {}, eos) for prompt in PROMPTS]  # it changes something
    for strategy in STRATEGIES:
        assert shaped_greedy(PROMPTS, settings, eos, strategy) == expected
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            assert shaped_greedy([prompt], settings, eos, strategy) == [tokens]


def test_every_processor_has_a_case() -> None:
    assert {name for settings, _ in CASES for name in settings} == set(PROCESSORS)


def state_of(texts: list[list[int]], prompt_lengths: list[int]) -> State:
    state = State(RUNNER, texts, horizon=40, max_nodes=8, rule=Greedy())
    state.prompt_lengths = prompt_lengths
    return state


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"temperature": 2, "top_k": 5},
        {"top_p": 0.7},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.05},
        {"typical_p": 0.6},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.1},
        {"top_h": 0.5},
        {"repetition_penalty": 1.4, "temperature": 0.9, "top_p": 0.95, "suppress_tokens": [USUAL]},
    ],
    ids=str,
)
def test_distributions_are_those_of_generate(settings: dict[str, Any]) -> None:
    """What generate draws from at each place of a text of its own, against ours at the same place."""
    prompt, count = PROMPTS[0], 4
    unset = {"temperature": 1.0, "top_k": 0}
    config = GenerationConfig(
        do_sample=True,
        max_new_tokens=count,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **{**unset, **settings, "temperature": float(settings.get("temperature", 1.0))},
    )
    torch.manual_seed(0)
    output = RUNNER.model.generate(torch.tensor([prompt]), generation_config=config)  # type: ignore[operator]
    text = output.sequences[0].tolist()
    with torch.inference_mode():
        logits = RUNNER.model(input_ids=output.sequences).logits
    shaping = Shaping(settings, (), RUNNER.vocab_size)
    for place, scores in enumerate(output.scores):
        length = len(prompt) + place
        state = state_of([text[:length]], [len(prompt)])
        ours = shaping.after_chain(
            state, logits[:, length - 1 : length], [torch.tensor([text[length - 1 : length]])]
        )
        torch.testing.assert_close(ours[0].softmax(-1).float(), scores.softmax(-1), rtol=1e-4, atol=1e-6)


def test_every_warper_is_tried() -> None:
    tried = test_distributions_are_those_of_generate.pytestmark[0].args[1]
    assert {name for settings in tried for name in settings} >= set(WARPERS)


def tree(tokens: Tensor, *parents: list[int]) -> Draft:
    """The tree with these parents, one list for each row."""
    place = torch.arange(tokens.shape[1]).expand_as(tokens)
    true = torch.ones_like(tokens, dtype=torch.bool)
    return Draft(tokens, torch.tensor(parents), place, place, true, true)


EOS_TOKEN = 5
IN_CONTEXT = {"repetition_penalty": 2.0, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "temperature": 0.5}


def naively_shaped(logits: Tensor, text: list[int], prompt_length: int) -> Tensor:
    """IN_CONTEXT by hand: logits [vocab] after a text."""
    expected = logits.clone()
    for token in set(text):
        expected[token] *= 2.0 if expected[token] < 0 else 0.5
    for place in range(1, len(text)):
        if text[place - 1] == text[-1]:
            expected[text[place]] = -torch.inf
    if len(text) - prompt_length < 3:
        expected[EOS_TOKEN] = -torch.inf
    return expected / 0.5


def test_every_node_is_shaped_by_the_text_up_to_it() -> None:
    """Trees of two rows, one with padding; all nodes, and the last ones alone as a drafter has them."""
    shaping = Shaping(IN_CONTEXT, (EOS_TOKEN,), RUNNER.vocab_size)
    texts = [[7, 8, 9, 7], [8, 9]]
    state = state_of(texts, [2, 1])
    tokens = torch.tensor([[7, 8, 9, 11, 8], [9, 8, 9, 11, 8]])
    logits = torch.randn((2, 5, RUNNER.vocab_size), generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    draft = tree(tokens, [-1, 0, 0, 2, 3], [-1, 0, 1, -1, 1])
    shaped = shaping.after_nodes(state, logits, draft)
    paths: list[list[list[int] | None]] = [[[], [1], [2], [2, 3], [2, 3, 4]], [[], [1], [1, 2], None, [1, 4]]]
    for row, text in enumerate(texts):
        for node, path in enumerate(paths[row]):
            if path is not None:
                whole = text + tokens[row, path].tolist()
                expected = naively_shaped(logits[row, node], whole, state.prompt_lengths[row])
                torch.testing.assert_close(shaped[row, node], expected)
    assert (shaped[..., EOS_TOKEN] == -torch.inf).any(dim=1).all()
    assert (shaped[..., EOS_TOKEN] > -torch.inf).any(dim=1).all()
    for first in range(1, 5):
        assert shaping.after_nodes(state, logits[:, first:], draft).equal(shaped[:, first:])
    assert (logits == before).all()


def test_a_chain_is_a_tree() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    whole = tree(tokens, [-1, 0, 1], [-1, 0, 1])
    chain = Draft(**{**vars(whole), "is_chain": True})
    for slices, lists in zip(node_paths(chain), node_paths(whole), strict=True):
        assert [tokens[0, path].tolist() for path in slices] == [tokens[0, path].tolist() for path in lists]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shaping_computes_in_float32_or_better(dtype: torch.dtype) -> None:
    logits = torch.randn((1, 1, 64)).to(dtype)
    state = state_of([[1, 2]], [2])
    for settings in ({}, {"temperature": 0.7}, {"repetition_penalty": 1.2}):
        shaped = Shaping(settings, (), 64).after_chain(state, logits, [torch.tensor([[2]])])
        assert shaped.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_without_settings_that_look_at_it_the_text_is_not_touched() -> None:
    shaping = Shaping({"temperature": 0.5, "top_k": 3, "suppress_tokens": [1]}, (), 64)
    nothing: Any = None
    assert shaping.after_chain(nothing, torch.randn((2, 1, 64)), nothing).isfinite().sum() == 6


def test_settings_about_the_end_do_nothing_where_there_is_none() -> None:
    settings = {"min_length": 9, "min_new_tokens": 9, "exponential_decay_length_penalty": (1, 2.0)}
    assert not Shaping(settings, (), 64).contextual
    assert Shaping(settings, (5,), 64).contextual


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": -1.0},
        {"repetition_penalty": "high"},
        {"bad_words_ids": [[64]]},
        {"bad_words_ids": 3},
        {"sequence_bias": {"a": 1}},
        {"top_k": 2.5},
        {"top_p": 7.0},
        {"temperature": 0.0},
        {"exponential_decay_length_penalty": 3},
    ],
    ids=str,
)
def test_impossible_values_are_refused_by_name(settings: dict[str, Any]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(UserError) as caught:
        Shaping(settings, (5,), 64)
    assert str(caught.value).startswith(f"generation_config.{name}={value!r} cannot be used: ")
    assert "\n" not in str(caught.value)


def test_a_drafter_is_shaped_as_the_target_is() -> None:
    settings = {"repetition_penalty": 2.0, "no_repeat_ngram_size": 2, "min_length": 6, "temperature": 0.5}
    shaping = Shaping(settings, (5,), RUNNER.vocab_size)
    state = state_of([[7, 8, 9, 7], [8, 9]], [2, 1])
    tokens = torch.tensor([[7, 8, 9, 11], [9, 8, 9, 11]])
    logits = torch.randn((2, 4, RUNNER.vocab_size), generator=torch.Generator().manual_seed(0))
    chain = Draft(**{**vars(tree(tokens, *[[-1, 0, 1, 2]] * 2)), "is_chain": True})
    shaped = shaping.after_nodes(state, logits, chain)
    for node in range(4):
        before = list(tokens[:, : node + 1].split(1, dim=1))
        drafters = shaping.after_chain(state, logits[:, node : node + 1], before)
        assert drafters.equal(shaped[:, node : node + 1])
