"""Trees of the exit layer: the right ones are drafted, no early layer runs twice, and nothing changes in the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eval.decoding.capture import GraphRunner
from eval.decoding.drafters.base import Drafter, State
from eval.decoding.drafters.confidence import DISAGREEMENT
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from eval.decoding.tree import Draft
from layerskip_model.context import Context
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.eval.decoding.sampled import LOWEST, draws, p_value, sampled_model, sampling, text_probabilities
from tests.eval.decoding.test_growing import Path
from tests.eval.decoding.test_maskless import maskless
from tests.eval.decoding.test_speculate import PROMPTS, naive_greedy
from tests.tiny_models import agreeing_model, tiny_model

AGREEING = Runner(agreeing_model(layers=2, scale=0.3))
SHAPES = [(1, 1, 1), (1, 4, 4), (3, 1, 3), (3, 2, 4), (3, 3, 8), (4, 4, 30)]  # depth, top k, tokens


def tree(runner: Runner, depth: int = 3, width: int = 3, count: int = 8, exit_layer: int = 2) -> Drafter:
    return make_drafter(
        "self_speculative",
        runner,
        exit_layer=exit_layer,
        num_speculations=depth,
        draft_tree=True,
        tree_top_k=width,
        tree_tokens=count,
    )


def run(
    runner: Runner, drafter: Drafter | None, prompts: list[list[int]], **options: Any
) -> list[Generation]:
    drafter = make_drafter("autoregressive", runner) if drafter is None else drafter
    return decode(runner, drafter, prompts, **{"max_new_tokens": 20, "eos_token_ids": (), **options})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_trees_are_lossless(shape: tuple[int, int, int]) -> None:
    expected = [naive_greedy(AGREEING.model, prompt, 20) for prompt in PROMPTS]
    together = run(AGREEING, tree(AGREEING, *shape), PROMPTS)
    alone = [run(AGREEING, tree(AGREEING, *shape), [prompt])[0] for prompt in PROMPTS]
    assert [row.tokens for row in together] == [row.tokens for row in alone] == expected
    assert [row.accepted_lengths for row in together] == [row.accepted_lengths for row in alone]
    assert [row.drafted for row in together] == [row.drafted for row in alone]
    assert sum(row.accepted for row in together) > 0
    assert max(max(row.accepted_lengths) for row in together) <= shape[0] + 1


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "gemma2", "gemma3"])
def test_trees_are_lossless_on_every_kind_of_attention(kind: str) -> None:
    runner = Runner(agreeing_model(kind, layers=2, scale=0.3))
    expected = [row.tokens for row in run(runner, None, PROMPTS)]
    rows = run(runner, tree(runner), PROMPTS)
    assert [row.tokens for row in rows] == expected
    assert sum(row.accepted for row in rows) > 0


def test_of_one_child_a_node_a_tree_is_the_chain() -> None:
    chain = make_drafter("self_speculative", AGREEING, exit_layer=2, num_speculations=4)
    for ours, plain in zip(
        run(AGREEING, tree(AGREEING, 4, 1, 4), PROMPTS), run(AGREEING, chain, PROMPTS), strict=True
    ):
        assert (ours.tokens, ours.accepted_lengths) == (plain.tokens, plain.accepted_lengths)


def drafts_of(
    runner: Runner, drafter: Drafter, prompts: list[list[int]], new: int = 16, **options: Any
) -> list[tuple[list[list[int]], Draft]]:
    """The texts before each draft, and the draft."""
    seen = []
    propose = drafter.propose

    def watched(state: State) -> Draft:
        draft = propose(state)
        seen.append(([list(text) for text in state.texts], draft))
        return draft

    drafter.propose = watched  # type: ignore[method-assign]
    run(runner, drafter, prompts, max_new_tokens=new, **options)
    return seen


def shallow(kind: str, layers: int) -> PreTrainedModel:
    """The model of the first layers, with the whole model's norm and head."""
    model = agreeing_model(kind, layers=2, scale=0.3)
    del model.get_decoder().layers[layers:]
    model.config.num_hidden_layers = layers
    return model


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_tree_is_that_of_separate_passes_over_every_path(kind: str) -> None:
    """Tokens, shape and exit states, beside a search that knows neither cache nor mask."""
    runner, exit_model = Runner(agreeing_model(kind, layers=2, scale=0.3)), shallow(kind, 2)
    depth, width, count = 3, 2, 5
    for texts, draft in drafts_of(runner, tree(runner, depth, width, count), PROMPTS[:2])[:2]:
        for row, text in enumerate(texts):
            paths: list[Path] = [()]
            for node in range(1, count + 1):
                paths.append((*paths[int(draft.parents[row, node])], int(draft.tokens[row, node])))
            assert paths[1:] == naive_tree(exit_model, text, depth, width, count)
            assert draft.hidden is not None
            logits = runner.logits(draft.hidden[row])
            for node, path in enumerate(paths):
                expected = exit_logits(exit_model, text, path)
                torch.testing.assert_close(logits[node], expected, rtol=0, atol=1e-5)
                assert int(draft.position[row, node]) == len(text) - 1 + len(path)


def exit_logits(model: PreTrainedModel, text: list[int], path: Path) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([text + list(path)])).logits[0, -1]


def naive_tree(model: PreTrainedModel, text: list[int], depth: int, width: int, count: int) -> list[Path]:
    """The paths that are kept, best first, by how likely the target is to take the same tokens greedily."""
    score: dict[Path, float] = {(): 0.0}
    frontier: list[Path] = [()]
    for _ in range(depth):
        level = []
        for path in frontier:
            values, tokens = (exit_logits(model, text, path) / DISAGREEMENT).log_softmax(-1).topk(width)
            for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
                score[(*path, token)] = score[path] + value
                level.append((*path, token))
        frontier = sorted(level, key=score.__getitem__, reverse=True)[:width]
    return sorted([path for path in score if path], key=score.__getitem__, reverse=True)[:count]


def test_no_early_layer_runs_twice_for_a_node() -> None:
    """Rows that enter each layer in a step: a root, two levels, what is fresh; and all that is kept, once."""
    rows: dict[int, list[int]] = {layer: [] for layer in range(4)}

    class Recording(Runner):
        def run(self, hidden: Tensor, start: int, stop: int, context: Context) -> Tensor:
            for layer in range(start, stop):
                rows[layer].append(hidden.shape[1])
            return super().run(hidden, start, stop, context)

    recording = Recording(AGREEING.model)
    for calls in rows.values():
        calls.clear()
    run(recording, tree(recording), [PROMPTS[0]], max_new_tokens=5)
    assert rows[0][:5] == rows[1][:5] == [len(PROMPTS[0]), 1, 3, 3, 6]
    assert rows[2][:2] == rows[3][:2] == [len(PROMPTS[0]), 9]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_max_new_tokens_inside_a_tree(count: int) -> None:
    expected = [naive_greedy(AGREEING.model, prompt, 6)[:count] for prompt in PROMPTS]
    rows = run(AGREEING, tree(AGREEING), PROMPTS, max_new_tokens=count)
    assert [row.tokens for row in rows] == expected
    assert all(sum(row.accepted_lengths) == count - 1 for row in rows)  # no draft goes beyond the room


def test_the_context_limit_and_the_end_of_a_text_inside_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows end at different times, each where it ends alone."""
    full = [row.tokens for row in run(AGREEING, None, PROMPTS)]
    monkeypatch.setattr(AGREEING, "context_length", 12)
    for eos in ((), (full[1][3],)):
        expected = run(AGREEING, None, PROMPTS, max_new_tokens=9, eos_token_ids=eos)
        rows = run(AGREEING, tree(AGREEING), PROMPTS, max_new_tokens=9, eos_token_ids=eos)
        assert [(row.tokens, row.finish_reason) for row in rows] == [
            (row.tokens, row.finish_reason) for row in expected
        ]
        assert len({len(row.tokens) for row in rows}) > 1


def test_passes_of_fixed_shape_give_the_same_tokens() -> None:
    graphs = GraphRunner(AGREEING)
    for prompts in ([PROMPTS[0]], PROMPTS):
        plain = run(AGREEING, tree(AGREEING), prompts)
        fixed = run(graphs, tree(graphs), prompts)
        assert [(row.tokens, row.accepted_lengths) for row in fixed] == [
            (row.tokens, row.accepted_lengths) for row in plain
        ]


SAMPLING = [{"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}, {"repetition_penalty": 1.5, "top_k": 3}]


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
def test_what_is_drawn_is_what_autoregressive_decoding_draws(settings: dict[str, Any]) -> None:
    """Token by token: what was drafted decides only how many of them a step wins."""
    if "repetition_penalty" in settings:
        settings = {**settings, "temperature": 0.9}
    streams = [4, 0, 9]
    rule = sampling(settings)
    expected = run(AGREEING, None, PROMPTS, rule=rule, streams=streams)
    rows = run(AGREEING, tree(AGREEING), PROMPTS, rule=rule, streams=streams)
    assert [row.tokens for row in rows] == [row.tokens for row in expected]
    alone = [
        run(AGREEING, tree(AGREEING), [prompt], rule=rule, streams=[stream])[0]
        for prompt, stream in zip(PROMPTS, streams, strict=True)
    ]
    assert [row.accepted_lengths for row in rows] == [row.accepted_lengths for row in alone]
    assert sum(row.accepted for row in rows) > 0


def test_texts_follow_the_models_own_distribution() -> None:
    """Children to which top-k leaves no probability are among the drafts."""
    model = sampled_model()
    settings = {"temperature": 1.2, "top_k": 3}
    shape = {"exit_layer": 1, "num_speculations": 2, "draft_tree": True, "tree_top_k": 4, "tree_tokens": 5}
    tokens = draws(Runner(model), "self_speculative", sampling(settings), **shape)
    assert p_value(tokens, text_probabilities(model, settings)) > LOWEST


def test_attention_without_masks_takes_no_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", maskless)
    model = tiny_model(attention="eager")
    model.config._attn_implementation = "flash_attention_2"
    runner = Runner(model)
    with pytest.raises(UserError, match="takes no mask"):
        run(runner, tree(runner), [PROMPTS[0]])
