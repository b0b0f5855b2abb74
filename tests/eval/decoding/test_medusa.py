"""Medusa heads draft the right trees, and nothing changes in the output, whatever they draft."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eval.decoding.acceptance import Greedy
from eval.decoding.capture import CompiledRunner, GraphRunner, captured
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.static_tree import TreeShape, checked_tree
from eval.decoding.typical import Typical
from layerskip_model.errors import UserError
from layerskip_model.medusa import MedusaHeads
from layerskip_model.runner import Runner
from tests.eval.decoding.medusa_heads import (
    CHAIN,
    WIDE,
    fitted_heads,
    medusa,
    naive_lengths,
    naive_ranks,
    one_state,
    random_heads,
)
from tests.eval.decoding.sampled import LOWEST, PROMPT, draws, p_value, sampled_model, text_probabilities
from tests.eval.decoding.sampled import sampling as sampling_rule
from tests.eval.decoding.test_maskless import maskless
from tests.eval.decoding.test_self_tree import drafts_of, run
from tests.eval.decoding.test_speculate import PROMPTS, naive_greedy
from tests.tiny_models import tiny_model

NEW = 20


class Fitted:
    """A model, what it writes after the prompts, and heads that have learnt some of it."""

    def __init__(self, kind: str = "llama") -> None:
        self.runner = Runner(tiny_model(kind, tie_word_embeddings=False))
        self.model = self.runner.model
        self.future = [naive_greedy(self.model, prompt, NEW) for prompt in PROMPTS]
        texts = [prompt + future for prompt, future in zip(PROMPTS, self.future, strict=True)]
        self.heads = fitted_heads(self.model, texts[:2], steps=4)

    def lengths(self, shape: TreeShape, new: int = NEW) -> list[list[int]]:
        """What each step wins, by the naive twin."""
        return [
            naive_lengths(self.model, self.heads, shape, prompt, future[:new])
            for prompt, future in zip(PROMPTS, self.future, strict=True)
        ]


LLAMA = Fitted()


@pytest.mark.parametrize("shape", [CHAIN, WIDE], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2", "gemma3"])
def test_greedy_decoding_is_lossless_and_wins_what_the_heads_know(kind: str, shape: TreeShape) -> None:
    """Rows of different lengths together, and alone; texts longer than sliding windows."""
    fitted = LLAMA if kind == "llama" else Fitted(kind)
    together = run(fitted.runner, medusa(fitted.runner, fitted.heads, shape), PROMPTS)
    alone = [
        run(fitted.runner, medusa(fitted.runner, fitted.heads, shape), [prompt])[0] for prompt in PROMPTS
    ]
    assert [row.tokens for row in together] == [row.tokens for row in alone] == fitted.future
    lengths = fitted.lengths(shape)
    assert [row.accepted_lengths for row in together] == [row.accepted_lengths for row in alone] == lengths
    assert [row.drafted for row in together] == [row.drafted for row in alone]
    every = {length for row in lengths for length in row}
    assert {1, 4} < every  # rejected at once, never, and in between


@pytest.mark.parametrize("settings", [{}, {"layers": 2}, {"shared": True}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_drafted_tree_is_the_naive_twins(kind: str, settings: dict[str, Any]) -> None:
    """Each node is the so-manieth best of its head at the state that the root was predicted from."""
    runner = Runner(tiny_model(kind))
    heads = random_heads(runner.model, **settings)
    drafts = drafts_of(runner, medusa(runner, heads, WIDE), PROMPTS, 12)
    for texts, draft in drafts[:2]:  # with room for all of it
        for row, text in enumerate(texts):
            best = naive_ranks(runner.model, heads, text)
            assert int(draft.tokens[row, 0]) == text[-1]
            assert draft.visible is not None
            paths: list[tuple[int, ...]] = [()]
            for node in range(1, draft.num_nodes):
                parent = int(draft.parents[row, node])
                level = len(paths[parent])
                paths.append((*paths[parent], best[level].index(int(draft.tokens[row, node]))))
                assert int(draft.position[row, node]) == len(text) + level
                seen = [paths[other] for other in draft.visible[row, node].nonzero()[:, 0].tolist()]
                assert sorted(seen) == [paths[-1][:depth] for depth in range(level + 2)]
            assert sorted(paths[1:]) == sorted(WIDE.paths)
            assert draft.slot[row].tolist() == list(range(len(text) - 1, len(text) + WIDE.size))


@pytest.mark.parametrize("seed", range(6))
def test_any_tree(seed: int) -> None:
    """Of random shape, cut to a random size; heads that know some of the text."""
    random = Random(seed)
    paths: list[list[int]] = []
    while len(paths) < 14:
        path = [*random.choice([[], *[path for path in paths if len(path) < 3]]), random.randrange(4)]
        paths += [] if path in paths else [path]
    shape = checked_tree("random", paths)
    size = random.randint(5, 14)
    rows = run(LLAMA.runner, medusa(LLAMA.runner, LLAMA.heads, shape, tree_tokens=size), PROMPTS)
    assert [row.tokens for row in rows] == LLAMA.future
    assert [row.accepted_lengths for row in rows] == LLAMA.lengths(shape.cut(size=size))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2", "phi3"])
def test_heads_that_know_nothing_change_nothing(kind: str) -> None:
    runner = Runner(tiny_model(kind))
    expected = [row.tokens for row in run(runner, None, PROMPTS)]
    for shape in (CHAIN, WIDE):
        rows = run(runner, medusa(runner, random_heads(runner.model), shape), PROMPTS)
        assert [row.tokens for row in rows] == expected


@pytest.mark.parametrize("shape", [CHAIN, WIDE], ids=["chain", "tree"])
@pytest.mark.parametrize("new", range(1, 8))
def test_a_tree_deeper_than_the_room_is_cut(shape: TreeShape, new: int) -> None:
    rows = run(LLAMA.runner, medusa(LLAMA.runner, LLAMA.heads, shape), PROMPTS, max_new_tokens=new)
    assert [row.tokens for row in rows] == [future[:new] for future in LLAMA.future]
    assert [row.accepted_lengths for row in rows] == LLAMA.lengths(shape, new)  # they add up to new - 1
    if new == 2:
        assert all(row.drafted == 0 for row in rows)


@pytest.mark.parametrize("shape", [CHAIN, WIDE], ids=["chain", "tree"])
def test_rows_end_at_different_times(shape: TreeShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the model's context, by an end token, and at their limit: each where plain decoding ends."""
    monkeypatch.setattr(LLAMA.runner, "context_length", 15)
    for eos in ((), (LLAMA.future[1][3],)):
        options: dict[str, Any] = {"max_new_tokens": 11, "eos_token_ids": eos}
        expected = run(LLAMA.runner, None, PROMPTS, **options)
        for runner in (LLAMA.runner, GraphRunner(LLAMA.runner)):
            rows = run(runner, medusa(runner, LLAMA.heads, shape), PROMPTS, **options)
            for row, plain in zip(rows, expected, strict=True):
                assert (row.tokens, row.finish_reason) == (plain.tokens, plain.finish_reason)
        ends = [(len(row.tokens), row.finish_reason) for row in expected]
        assert ends == [(8, "context"), (4, "eos") if eos else (11, "length"), (10, "context")]


def test_nothing_is_emitted_after_an_end_token_inside_an_accepted_path() -> None:
    """Nor counted as output: what a step won beyond it is in accepted_lengths alone."""
    future = LLAMA.future[0]
    place = 1
    for length in LLAMA.lengths(CHAIN)[0]:
        inside = [p for p in range(place, place + length - 1) if future[p] not in future[:p]]
        if inside:
            break
        place += length
    end = inside[0]
    eos = future[end]
    for shape in (CHAIN, WIDE):
        (row,) = run(
            LLAMA.runner, medusa(LLAMA.runner, LLAMA.heads, shape), PROMPTS[:1], eos_token_ids=(eos,)
        )
        assert (row.tokens, row.finish_reason) == (future[: end + 1], "eos")
        assert 1 + sum(row.accepted_lengths) > len(row.tokens)


def test_no_phantom_tokens_where_a_tree_has_no_path() -> None:
    """A target that always says 0: what is not there must not be taken for a draft of token 0."""
    model = one_state(tiny_model())
    with torch.inference_mode():
        state = model.get_decoder()(input_ids=torch.tensor([[1]])).last_hidden_state[0, 0]
    head = model.get_output_embeddings()
    head.weight.data[0] = state
    runner = Runner(model)
    ragged = checked_tree("ragged", [[0], [1], [0, 0], [0, 0, 0], [1, 0]])
    for wrong, won in (((0, 1, 2), 1), ((0,), 1), ((1,), 2), ((2,), 3), ((), 4)):
        heads = copies_of_the_lm_head(runner)
        for index in wrong:
            heads.projections[index].get_parameter("weight").data[0] -= 2 * state
        for shape in (CHAIN, ragged):
            rows = run(runner, medusa(runner, heads, shape), PROMPTS[:2], max_new_tokens=11)
            assert [row.tokens for row in rows] == [[0] * 11] * 2
            for row in rows:
                assert set(row.accepted_lengths[:-1]) == {won}
                assert sum(row.accepted_lengths) == 10


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({"num_speculations": 1}, checked_tree("cut", [[0], [1], [2]])),
        ({"num_speculations": 2}, checked_tree("cut", [[0], [1], [0, 0], [0, 1], [2], [1, 0]])),
        ({"tree_tokens": 4}, checked_tree("cut", [[0], [1], [0, 0], [0, 1]])),
        ({"num_speculations": 2, "tree_tokens": 3}, checked_tree("cut", [[0], [1], [0, 0]])),
    ],
    ids=str,
)
def test_less_of_a_tree_may_be_drafted(cut: dict[str, int], expected: TreeShape) -> None:
    drafter = medusa(LLAMA.runner, LLAMA.heads, WIDE, **cut)
    assert drafter.settings.tree.paths == expected.paths
    assert drafter.max_nodes == len(expected.paths) + 1
    rows = run(LLAMA.runner, drafter, PROMPTS)
    assert [row.tokens for row in rows] == LLAMA.future
    assert [row.accepted_lengths for row in rows] == LLAMA.lengths(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tree": TreeShape.chain(4)}, "tree 'chain' has 4 levels and 'heads' 3 heads; cut it to 3"),
        (
            {"num_speculations": 4},
            "medusa: num_speculations=4 is more than the 3 levels of tree 'chain'; give 3",
        ),
        ({"tree_tokens": 4}, "medusa: tree_tokens=4 is more than the 3 nodes of tree 'chain'; give 3"),
        ({"tree_tokens": 0}, "tree_tokens=0 is not valid; give a whole number of 1 or more"),
        ({"num_speculations": 0}, "num_speculations=0 is not valid"),
    ],
)
def test_more_than_there_is_cannot_be_drafted(settings: dict[str, Any], message: str) -> None:
    shape = settings.pop("tree", None)
    with pytest.raises(UserError) as caught:
        medusa(LLAMA.runner, LLAMA.heads, shape, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rank_beyond_the_vocabulary_is_a_mistake_of_the_tree() -> None:
    shape = checked_tree("broad", [[0], [64]])
    with pytest.raises(UserError, match=r"medusa: tree 'broad' has rank 64 and the model's vocabulary 64"):
        medusa(LLAMA.runner, LLAMA.heads, shape)
    medusa(LLAMA.runner, LLAMA.heads, checked_tree("all", [[0], [63]]))


@pytest.mark.parametrize("shape", [CHAIN, WIDE], ids=["chain", "tree"])
def test_passes_of_fixed_shape_give_the_same_tokens(shape: TreeShape) -> None:
    """What CUDA graphs record, without the recording."""
    graphs = GraphRunner(LLAMA.runner)
    for prompts, new in ((PROMPTS[:1], NEW), (PROMPTS, 7), (PROMPTS, NEW)):
        plain, fixed = (
            run(one, medusa(one, LLAMA.heads, shape), prompts, max_new_tokens=new)
            for one in (LLAMA.runner, graphs)
        )
        assert [(row.tokens, row.accepted_lengths) for row in fixed] == [
            (row.tokens, row.accepted_lengths) for row in plain
        ]


@pytest.mark.slow
def test_compiled_passes_give_the_same_tokens() -> None:
    compiled = captured(LLAMA.runner)
    assert isinstance(compiled, CompiledRunner)
    for shape in (CHAIN, WIDE):
        rows = run(compiled, medusa(compiled, LLAMA.heads, shape), PROMPTS[:1])
        assert rows[0].tokens == LLAMA.future[0]
        assert rows[0].accepted_lengths == LLAMA.lengths(shape)[0]


SHAPINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[3], [19, 19], [17]]},
]


@pytest.mark.parametrize("settings", SHAPINGS, ids=str)
@pytest.mark.parametrize("is_sampling", [False, True])
def test_settings_that_look_at_the_text_before(settings: dict[str, Any], is_sampling: bool) -> None:
    """Each node sees its own path before it; forbidden tokens are not drafted either."""
    shaping = Shaping(settings, (), 64)
    rule = Sampling(shaping, 0) if is_sampling else Greedy(shaping)
    expected = run(LLAMA.runner, None, PROMPTS, rule=rule)
    assert [row.tokens for row in expected] != LLAMA.future
    for shape in (CHAIN, WIDE):
        rows = run(LLAMA.runner, medusa(LLAMA.runner, LLAMA.heads, shape), PROMPTS, rule=rule)
        assert [row.tokens for row in rows] == [row.tokens for row in expected]
        assert any(row.accepted for row in rows)
    if "bad_words_ids" in settings:
        drafter = medusa(LLAMA.runner, LLAMA.heads, WIDE)
        for _, draft in drafts_of(LLAMA.runner, drafter, PROMPTS, rule=rule):
            assert not torch.isin(draft.tokens[:, 1:], torch.tensor([3, 17])).any()


def test_first_choices_are_shaped_after_those_before_them() -> None:
    """A rule that forbids every repetition gets drafts of distinct tokens from heads that always say the same."""
    runner = Runner(one_state(tiny_model()))
    heads = copies_of_the_lm_head(runner)
    rule = Greedy(Shaping({"no_repeat_ngram_size": 1}, (), 64))
    (row,) = run(runner, medusa(runner, heads), PROMPTS[:1], rule=rule)
    assert row.tokens == run(runner, None, PROMPTS[:1], rule=rule)[0].tokens
    assert len(set(row.tokens)) == NEW
    for _, draft in drafts_of(runner, medusa(runner, heads), PROMPTS[:1], rule=rule):
        told = draft.tokens[0].tolist()
        assert told[0] not in told[1:]


def copies_of_the_lm_head(runner: Runner, number: int = 3) -> MedusaHeads:
    """Where the state never changes, these know all that comes."""
    heads = MedusaHeads.new(runner.backbone, heads=number, layers=1, shared=False)
    return heads.to(runner.dtype).eval()


SAMPLING = [{"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}, {"temperature": 0.9, "top_k": 3}]


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
@pytest.mark.parametrize("shape", [CHAIN, WIDE], ids=["chain", "tree"])
def test_what_is_drawn_is_what_plain_sampling_draws(shape: TreeShape, settings: dict[str, Any]) -> None:
    """Token by token, on the same stream, together and alone."""
    rule, streams = Sampling(Shaping(settings, (), 64), 0), [4, 0, 9]
    expected = run(LLAMA.runner, None, PROMPTS, rule=rule, streams=streams)
    rows = run(LLAMA.runner, medusa(LLAMA.runner, LLAMA.heads, shape), PROMPTS, rule=rule, streams=streams)
    assert [row.tokens for row in rows] == [row.tokens for row in expected]
    alone = [
        run(LLAMA.runner, medusa(LLAMA.runner, LLAMA.heads, shape), [prompt], rule=rule, streams=[stream])[0]
        for prompt, stream in zip(PROMPTS, streams, strict=True)
    ]
    assert [row.accepted_lengths for row in rows] == [row.accepted_lengths for row in alone]


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
def test_heads_foresee_what_is_drawn(settings: dict[str, Any]) -> None:
    """Where they know the distribution every draft is accepted: they use the noise of the right places."""
    runner = Runner(one_state(tiny_model()))
    rule = Sampling(Shaping(settings, (), 64), 0)
    rows = run(runner, medusa(runner, copies_of_the_lm_head(runner)), PROMPTS, max_new_tokens=17, rule=rule)
    assert [row.accepted_lengths for row in rows] == [[4] * 4] * 3
    assert len({token for row in rows for token in row.tokens}) >= 3


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"temperature": 1.2, "top_k": 3}], ids=str)
def test_texts_follow_the_models_own_distribution(settings: dict[str, Any]) -> None:
    model = sampled_model()
    heads = fitted_heads(model, [PROMPT + naive_greedy(model, PROMPT, 8)], number=2, steps=4)
    drafter = medusa(Runner(model), heads, checked_tree("small", [[0], [1], [0, 0], [0, 1], [1, 0]]))
    tokens = draws(Runner(model), "medusa", sampling_rule(settings), **vars(drafter.settings))
    assert p_value(tokens, text_probabilities(model, settings)) > LOWEST


def test_typical_acceptance_takes_the_longest_path_of_what_is_likely() -> None:
    """Which the greedy rule may not take; it is not lossless."""
    shaping = Shaping({"temperature": 1.0}, (), 64)
    all_of_it, sampled = Typical(shaping, 0, 0.0, 0.3), Sampling(shaping, 0)
    rows = run(
        LLAMA.runner, medusa(LLAMA.runner, LLAMA.heads, WIDE), PROMPTS, max_new_tokens=17, rule=all_of_it
    )
    assert [row.accepted_lengths for row in rows] == [[4] * 4] * 3  # every draft is kept: the deepest path
    drafts = drafts_of(LLAMA.runner, medusa(LLAMA.runner, LLAMA.heads, WIDE), PROMPTS[:1], 17, rule=all_of_it)
    for place, (_, draft) in zip(range(1, 17, 4), drafts, strict=True):
        deepest = [node for node in range(draft.num_nodes) if draft.position[0, node] == 6 + place + 3]
        paths = [[int(t) for t in draft.tokens[0, draft.visible[0, node]]] for node in deepest]  # type: ignore[index]
        assert rows[0].tokens[place - 1 : place + 3] in paths
    medusas_own = Typical(shaping, 0, 0.09, 0.3)
    found = run(LLAMA.runner, medusa(LLAMA.runner, LLAMA.heads, WIDE), PROMPTS, rule=medusas_own)
    plain = run(LLAMA.runner, None, PROMPTS, rule=sampled)
    assert [row.tokens for row in found] != [row.tokens for row in plain]
    assert sum(row.accepted for row in found) > 0


def test_attention_without_masks_takes_chains_and_no_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", maskless)
    model = tiny_model(attention="eager", tie_word_embeddings=False)
    model.config._attn_implementation = "flash_attention_2"
    runner = Runner(model)
    (row,) = run(runner, medusa(runner, LLAMA.heads, CHAIN), PROMPTS[:1])
    assert (row.tokens, row.accepted_lengths) == (LLAMA.future[0], LLAMA.lengths(CHAIN)[0])
    with pytest.raises(UserError, match="takes no mask"):
        run(runner, medusa(runner, LLAMA.heads, WIDE), PROMPTS[:1])
