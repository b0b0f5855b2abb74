"""Sampling beside greedy decoding, batches as what is timed, and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import Request, run_benchmark, write_report
from eval.results import Report
from eval.target import Target
from layerskip_model.errors import UserError
from tests.eval.benchmarks import FOUR, SETTINGS, dataset, spy_on

BATCHED = ["def anna_1(value):\n", "def bert", "    return", "x", "def dörte_2(value):\n    return"]


def outputs(report: Report) -> dict[tuple[str, bool], list[str]]:
    """Each strategy's texts, greedy and sampled."""
    both = [*report.strategies, *report.sampled]
    return {(s.name, s.sampled): [prompt.text for prompt in s.prompts] for s in both}


@pytest.fixture(scope="module")
def by_batch_size(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Report]:
    """Both ways of choosing tokens, one prompt at a time and two."""
    path = dataset(tmp_path_factory.mktemp("prompts"), BATCHED)
    given = {**SETTINGS, "sample": None, "top_k": 5, "seed": 3, "dataset": path}
    return {n: run_benchmark(tiny_target, Request(FOUR, **given, batch_size=n)) for n in (1, 2)}


def test_greedy_and_sampled_are_measured_in_one_run(by_batch_size: dict[int, Report]) -> None:
    report = by_batch_size[1]
    for strategies, is_sampled in ((report.strategies, False), (report.sampled, True)):
        assert [strategy.name for strategy in strategies] == FOUR
        for strategy in strategies:
            is_baseline = strategy.name == report.baseline
            assert strategy.sampled == is_sampled
            assert strategy.compared == (0 if is_baseline or is_sampled else 5)
            assert strategy.equal == strategy.compared
            assert (strategy.speedup_median is None) == is_baseline
            assert (strategy.predicted_speedup is not None) == (strategy.name == "self_speculative")
            assert all(prompt.tokens_equal is None for prompt in strategy.prompts) == (strategy.compared == 0)
    texts = outputs(report)
    assert texts["autoregressive", True] != texts["autoregressive", False]
    assert report.settings["greedy"] == {"do_sample": False}
    assert report.settings["sampling"] == {"do_sample": True, "temperature": 0.8, "top_k": 5, "top_p": 1.0}
    assert report.environment.seed == 3


def test_outputs_do_not_depend_on_the_batch_size(by_batch_size: dict[int, Report]) -> None:
    alone, together = outputs(by_batch_size[1]), outputs(by_batch_size[2])
    del together["hf_generate", True]  # transformers draws for a batch from one stream
    for key, texts in together.items():
        assert texts == alone[key], key


def test_a_batch_is_what_is_timed(by_batch_size: dict[int, Report]) -> None:
    report = by_batch_size[2]
    assert report.skipped == {"hf_early_exit": "transformers drafts for one prompt at a time"}
    assert report.settings["batch_size"] == 2
    for strategy in [*report.strategies, *report.sampled]:
        assert strategy.name != "hf_early_exit"
        assert [prompt.batch for prompt in strategy.prompts] == [0, 0, 1, 1, 2]
        seconds = [prompt.seconds for prompt in strategy.prompts]
        assert seconds[0] == seconds[1] != seconds[2] == seconds[3] != seconds[4]
        assert strategy.tokens_per_second is not None
        tokens = sum(prompt.new_tokens for prompt in strategy.prompts)
        assert strategy.tokens_per_second.value == pytest.approx(
            tokens / (seconds[0] + seconds[2] + seconds[4])
        )
    for strategy in report.strategies[1:]:
        assert (strategy.equal, strategy.compared) == (5, 5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_measured_on_the_largest_batch(by_batch_size: dict[int, Report]) -> None:
    for size, largest in ((1, {4}), (2, {0, 1})):
        for strategy in [*by_batch_size[size].strategies, *by_batch_size[size].sampled]:
            assert {p.index for p in strategy.prompts if p.peak_bytes is not None} == largest
            assert strategy.peak_bytes is not None
            assert strategy.added_bytes is not None
            assert 0 <= strategy.added_bytes < strategy.peak_bytes
            assert (strategy.memory_ratio is None) == (strategy.name == "autoregressive")


def test_sampling_alone(tiny_target: Target, tmp_path: Path) -> None:
    given = {**SETTINGS, "sample": True, "temperature": 0.3, "dataset": dataset(tmp_path, BATCHED[:2])}
    found = run_benchmark(tiny_target, Request(["self_speculative"], **given))
    assert found.strategies == []
    assert [strategy.name for strategy in found.sampled] == ["autoregressive", "self_speculative"]
    assert "greedy" not in found.settings
    write_report(found, tmp_path / "out")
    assert "sampled at temperature 0.3" in (tmp_path / "out" / "table.txt").read_text()


def test_a_failed_batch_takes_its_own_prompts_along_and_no_others(
    tiny_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tiny_target.encode(BATCHED[1])

    def fail(name: str, prompt: list[int]) -> None:
        if name == "self_speculative" and prompt == bad:
            raise RuntimeError("out of memory")

    spy_on(monkeypatch, fail)
    path = dataset(tmp_path, [*BATCHED[:3], "zq" * 200, BATCHED[3]])
    found = run_benchmark(tiny_target, Request(["self_speculative"], **SETTINGS, dataset=path, batch_size=2))
    base, ours = found.strategies
    assert [prompt.status for prompt in base.prompts] == ["ok", "ok", "ok", "failed", "ok"]
    assert [prompt.status for prompt in ours.prompts] == ["failed", "failed", "ok", "failed", "ok"]
    assert [prompt.batch for prompt in ours.prompts] == [0, 0, 1, None, 1]
    assert [prompt.index for prompt in ours.prompts] == list(range(5))
    assert ours.prompts[0].error == "its batch of 2 prompts: RuntimeError: out of memory"
    assert "the model's context is 128" in (ours.prompts[3].error or "")
    assert (ours.failed, ours.left_out, ours.equal, ours.compared) == (3, 3, 2, 2)
    assert (base.failed, base.left_out) == (1, 1)


def test_a_penalty_of_the_checkpoint_is_on_both_sides(
    tiny_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dataset(tmp_path, BATCHED[:3])
    before = outputs(run_benchmark(tiny_target, Request(FOUR, **SETTINGS, dataset=path)))
    monkeypatch.setattr(tiny_target.model.generation_config, "repetition_penalty", 3.0)
    found = run_benchmark(tiny_target, Request(FOUR, **SETTINGS, dataset=path))
    assert [strategy.equal for strategy in found.strategies] == [0, 3, 3, 3]
    assert outputs(found) != before
    assert found.settings["greedy"] == {"do_sample": False, "repetition_penalty": 3.0}
    monkeypatch.setattr(tiny_target.model.generation_config, "num_beams", 4)
    with pytest.raises(UserError, match="num_beams"):
        run_benchmark(tiny_target, Request(FOUR, **SETTINGS, dataset=path))
