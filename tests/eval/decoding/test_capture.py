"""Captured passes give the tokens of passes that are not."""

from __future__ import annotations

import pytest

from eval.decoding.capture import BUCKET, CompiledRunner, GraphRunner, bucketed, captured
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.tiny_models import agreeing_model

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13]]
STRATEGIES = {"autoregressive": {}, "self_speculative": {"exit_layer": 1, "num_speculations": 3}}


def run(runner: Runner, strategy: str, prompts: list[list[int]], new: int = 14) -> list[Generation]:
    drafter = make_drafter(strategy, runner, **STRATEGIES[strategy])
    return decode(runner, drafter, prompts, max_new_tokens=new, eos_token_ids=())


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "phi3"])
def test_passes_of_fixed_shape_give_the_same_tokens(kind: str, strategy: str) -> None:
    """What CUDA graphs record, without the recording."""
    runner = Runner(agreeing_model(kind))
    graphs = GraphRunner(runner)
    for prompts in ([PROMPTS[0]], PROMPTS, [PROMPTS[1]], PROMPTS[::-1]):  # the kept cache holds older texts
        plain, static = (run(one, strategy, prompts) for one in (runner, graphs))
        assert [row.tokens for row in static] == [row.tokens for row in plain]
        assert [row.accepted_lengths for row in static] == [row.accepted_lengths for row in plain]
    assert len({id(cache) for cache, *_ in graphs._passes}) == 2  # one for each batch size


def test_a_longer_text_gets_a_larger_cache_and_reads_no_more_of_it_than_needed() -> None:
    runner = Runner(agreeing_model(max_position_embeddings=1024))
    graphs = GraphRunner(runner)
    run(graphs, "autoregressive", [PROMPTS[0]])
    assert graphs._caches[1].capacity == BUCKET
    long = [[5, 6, 7] * 80]
    assert (
        run(graphs, "autoregressive", long, 40)[0].tokens == run(runner, "autoregressive", long, 40)[0].tokens
    )
    assert graphs._caches[1].capacity == 2 * BUCKET
    assert sorted(extent for cache, _, _, extent in graphs._passes if cache is graphs._caches[1]) == [
        BUCKET,
        2 * BUCKET,
    ]


def test_a_compiled_pass_gives_the_same_tokens() -> None:
    """The one of autoregressive decoding, compiled once for all lengths."""
    runner = Runner(agreeing_model(num_hidden_layers=1))
    compiled = captured(runner)
    assert isinstance(compiled, CompiledRunner)
    for prompt in PROMPTS[:2]:
        plain, ours = (run(one, "autoregressive", [prompt], 8) for one in (runner, compiled))
        assert ours[0].tokens == plain[0].tokens
    assert len(compiled._passes) == 1


def test_every_compiled_pass_gives_the_same_tokens() -> None:
    """Those of drafts, the last of a draft and verifications, of spans and of ragged rows."""
    runner = Runner(agreeing_model(num_hidden_layers=2))
    compiled = captured(runner)
    assert isinstance(compiled, CompiledRunner)
    for prompts in ([PROMPTS[0]], [PROMPTS[1], PROMPTS[0]]):
        plain, ours = (run(one, "self_speculative", prompts) for one in (runner, compiled))
        assert [row.tokens for row in ours] == [row.tokens for row in plain]
    passes = len(compiled._passes)
    run(
        compiled, "self_speculative", [[9, 8, 7, 6, 5, 4, 3, 2]], 30
    )  # longer than any before, and nothing new
    assert (
        len(compiled._passes) == passes == 6
    )  # draft, last of a draft, verification; of spans, of ragged rows


def test_slots_are_rounded_up() -> None:
    assert [bucketed(slots) for slots in (1, BUCKET, BUCKET + 1)] == [BUCKET, BUCKET, 2 * BUCKET]


def test_a_model_on_several_devices_is_refused() -> None:
    runner = Runner(agreeing_model())
    runner.backbone.layers[1]._hf_hook = object()  # type: ignore[assignment]
    with pytest.raises(UserError, match="--compile needs the whole model on one device"):
        captured(runner)
