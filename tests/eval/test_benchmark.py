"""The protocol: warm-up, rotation, comparison, failures, and what a report then holds."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import eval.benchmark as module
from eval import Request, load_target, run_benchmark, write_report
from eval.contestants import Contestant
from eval.decoding.capture import GraphRunner
from eval.results import Report, StrategyResult
from eval.target import Target
from layerskip_model.errors import UserError

FOUR = ["autoregressive", "self_speculative", "hf_generate", "hf_early_exit"]
SETTINGS: dict[str, Any] = {"exit_layer": 2, "num_speculations": 3, "max_steps": 10, "sample": False}


def dataset(directory: Path, prompts: Sequence[str], *others: dict[str, Any]) -> Path:
    path = directory / "prompts.jsonl"
    rows = [*({"prompt": prompt} for prompt in prompts), *others]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_name(report: Report) -> dict[str, StrategyResult]:
    return {strategy.name: strategy for strategy in report.strategies}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """The prompts of every decode of the benchmark in order: strategy and prompt."""
    seen: list[tuple[str, list[int]]] = []
    spy_on(monkeypatch, lambda name, prompt: seen.append((name, prompt)))
    return seen


def spy_on(
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[str, list[int]], None],
    after: Callable[[str, Any], Any] = lambda name, generation: generation,
) -> None:
    """Call `before` ahead of every decode, and let `after` change what comes of it."""
    original = module.make_contestant

    def make(name: str, *args: Any) -> Contestant:
        contestant = original(name, *args)

        def decode(prompts: list[list[int]], streams: list[int]) -> Any:
            for prompt in prompts:
                before(contestant.name, prompt)
            return [after(contestant.name, one) for one in contestant.decode(prompts, streams)]

        return dataclasses.replace(contestant, decode=decode)

    monkeypatch.setattr(module, "make_contestant", make)


@pytest.fixture(scope="module")
def report(finished_run: Path) -> Report:
    target = load_target(run=str(finished_run), dtype="float64")
    return run_benchmark(target, Request(FOUR, **SETTINGS, num_samples=5))


def test_all_strategies_say_the_same_and_are_measured(report: Report) -> None:
    assert [strategy.name for strategy in report.strategies] == FOUR
    for strategy in report.strategies:
        is_baseline = strategy.name == report.baseline
        assert strategy.failed == strategy.left_out == 0
        assert (strategy.equal, strategy.compared) == ((0, 0) if is_baseline else (5, 5))
        assert (strategy.speedup_median is None) == is_baseline
        assert strategy.tokens_per_second is not None
        for prompt in strategy.prompts:
            assert prompt.new_tokens == 10
            assert prompt.seconds > 0
            assert prompt.text
            assert (prompt.prefill_seconds is None) == strategy.name.startswith("hf_")
            if prompt.prefill_seconds is not None and prompt.decode_seconds is not None:
                assert prompt.prefill_seconds + prompt.decode_seconds == pytest.approx(prompt.seconds)
    texts = [[prompt.text for prompt in strategy.prompts] for strategy in report.strategies]
    assert texts == [texts[0]] * 4


def test_self_speculation_has_acceptance_and_a_prediction(report: Report) -> None:
    found = by_name(report)
    ours = found["self_speculative"]
    assert found["autoregressive"].acceptance_length == 1.0
    assert ours.acceptance_length is not None
    assert 1.0 <= ours.acceptance_length <= 4.0
    assert ours.verify_cost is not None
    assert ours.verify_cost > 0
    mean_accepted = ours.acceptance_length - 1
    expected = (1 + mean_accepted) / (4 * 2 / 4 + ours.verify_cost * 2 / 4)
    assert ours.predicted_speedup == pytest.approx(expected)
    others = [strategy for name, strategy in found.items() if name != "self_speculative"]
    assert all(strategy.predicted_speedup is None for strategy in others)


def test_a_run_brings_exits_and_training(report: Report) -> None:
    assert report.exits is not None
    assert [quality.layer for quality in report.exits] == [1, 2, 3, 4]
    assert report.training is not None
    assert [point.step for point in report.training] == [8, 16, 24]
    assert report.training[-1].tokens == 24 * 8 * 32
    assert set(report.training[-1].heldout or {}) == {1, 2, 3, 4}
    assert report.title == "Decoding run"
    assert report.environment.dtype == "float64"
    assert report.settings["max_steps"] == 10


def test_the_report_is_written_whole(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "out")
    text = (tmp_path / "out" / "report.json").read_text()
    assert Report.model_validate_json(text) == report
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    table = (tmp_path / "out" / "table.txt").read_text()
    for line in table.splitlines():
        assert len(line) <= 80
        assert line == line.rstrip()
    for strategy in report.strategies:
        assert strategy.label.split()[-1] in table
        assert strategy.tokens_per_second is not None
        assert f"{strategy.tokens_per_second.value:.1f}" in table


def test_order_rotates_after_a_warm_up_that_is_not_measured(
    tiny_target: Target, tmp_path: Path, calls: list[tuple[str, list[int]]]
) -> None:
    prompts = [f"def anna_{i}(value)" for i in range(7)]
    path = dataset(tmp_path, prompts)
    run_benchmark(tiny_target, Request(FOUR[:3], **SETTINGS, dataset=path, num_samples=5))
    warm_up, measured, memory = calls[:3], calls[3:18], calls[18:]
    assert [name for name, _ in warm_up] == FOUR[:3]
    chosen = [tuple(prompt) for name, prompt in measured if name == "autoregressive"]
    assert chosen == [tuple(tiny_target.encode(prompts[i])) for i in (0, 1, 2, 4, 5)]
    assert len({tuple(prompt) for _, prompt in warm_up}) == 1
    assert tuple(warm_up[0][1]) not in chosen
    a, b, c = FOUR[:3]
    expected = [[a, b, c], [b, c, a], [c, a, b], [a, b, c], [b, c, a]]
    assert [name for name, _ in measured] == [name for order in expected for name in order]
    for begin in range(0, 15, 3):
        assert len({tuple(prompt) for _, prompt in measured[begin : begin + 3]}) == 1
    assert [name for name, _ in memory] == FOUR[:3] * 3


def test_names_are_resolved_and_the_baseline_is_always_there(
    tiny_target: Target, tmp_path: Path, calls: list[tuple[str, list[int]]]
) -> None:
    path = dataset(tmp_path, ["def anna"])
    for names in (["greedy", "autoregressive"], ["hf_generate", "hf_generate"]):
        found = run_benchmark(tiny_target, Request(names, **SETTINGS, dataset=path))
        wanted = ["autoregressive"] if "greedy" in names else ["autoregressive", "hf_generate"]
        assert [strategy.name for strategy in found.strategies] == wanted
    # With one prompt half of it is the warm-up.
    assert len(calls[0][1]) == len(calls[1][1]) // 2


@pytest.mark.parametrize("broken", ["autoregressive", "hf_generate"])
def test_a_failed_prompt_is_reported_and_left_out(
    tiny_target: Target, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"def anna_{i}(value)" for i in range(4)]
    bad = tiny_target.encode(prompts[1])

    def fail(name: str, prompt: list[int]) -> None:
        if name == broken and prompt == bad:
            raise RuntimeError("out of memory\nwith details")

    spy_on(monkeypatch, fail)
    path = dataset(tmp_path, [*prompts, "the warm-up"])
    found = by_name(
        run_benchmark(
            tiny_target, Request(["self_speculative", "hf_generate"], **SETTINGS, dataset=path, num_samples=4)
        )
    )
    result = found[broken].prompts[1]
    assert (result.status, result.error) == ("failed", "RuntimeError: out of memory")
    assert (result.new_tokens, result.seconds, result.tokens_equal) == (0, 0.0, None)
    for name, strategy in found.items():
        assert strategy.failed == (name == broken)
        if name != "autoregressive":
            touched = broken in (name, "autoregressive")
            assert strategy.left_out == touched
            assert (strategy.equal, strategy.compared) == (4 - touched, 4 - touched)


def test_a_strategy_that_always_fails_spoils_nothing(
    tiny_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, prompt: list[int]) -> None:
        if name == "hf_generate":
            raise RuntimeError

    spy_on(monkeypatch, fail)
    path = dataset(tmp_path, ["def anna", "def bert"])
    found = run_benchmark(tiny_target, Request(FOUR, **SETTINGS, dataset=path))
    assert [strategy.failed for strategy in found.strategies] == [0, 0, 2, 0]
    write_report(found, tmp_path / "out")


def test_a_prompt_beyond_the_context_fails_alone(tiny_target: Target, tmp_path: Path) -> None:
    long = "zq" * 200
    path = dataset(tmp_path, ["def anna", long, "def bert"])
    found = run_benchmark(tiny_target, Request(FOUR, **SETTINGS, dataset=path))
    for strategy in found.strategies:
        assert [prompt.status for prompt in strategy.prompts] == ["ok", "failed", "ok"]
        assert "the model's context is 128" in (strategy.prompts[1].error or "")
    only_long = Request(FOUR, **SETTINGS, dataset=dataset(tmp_path, [long]))
    with pytest.raises(UserError, match="no prompt of the dataset fits"):
        run_benchmark(tiny_target, only_long)


def test_an_output_that_differs_is_found(
    tiny_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupt(name: str, generation: Any) -> Any:
        if name == "self_speculative":
            generation.tokens[3] = (generation.tokens[3] + 1) % 256
        return generation

    spy_on(monkeypatch, lambda name, prompt: None, corrupt)
    path = dataset(tmp_path, ["def anna", "def bert"])
    found = by_name(run_benchmark(tiny_target, Request(FOUR, **SETTINGS, dataset=path)))
    assert (found["self_speculative"].equal, found["self_speculative"].compared) == (0, 2)
    assert found["hf_generate"].equal == found["hf_early_exit"].equal == 2
    for prompt in found["self_speculative"].prompts:
        assert prompt.difference is not None
        assert (prompt.difference.position, prompt.difference.verdict) == (3, "bug")


def test_rows_with_turns_and_a_model_without_a_run(
    finished_run: Path, tmp_path: Path, run_without: Callable[..., Path]
) -> None:
    target = load_target(str(run_without("run.json") / "export"), dtype="float64")
    path = dataset(tmp_path, [], {"turns": ["def anna", "and then?"], "category": "coding"})
    found = run_benchmark(target, Request(["self_speculative"], **SETTINGS, dataset=path))
    assert found.exits is found.training is None
    assert found.strategies[1].prompts[0].source == "coding:1"
    assert found.strategies[1].equal == 1
    with pytest.raises(UserError, match=r"heldout: .* lies in no training run"):
        run_benchmark(target, Request(["self_speculative"], **SETTINGS))
    unsettled = Request(["self_speculative"], dataset=path)
    with pytest.raises(UserError, match="self_speculative needs exit_layer"):
        run_benchmark(target, unsettled)


def test_the_runs_suggestion_is_used_where_nothing_is_said(tiny_target: Target, tmp_path: Path) -> None:
    assert tiny_target.run is not None
    path = dataset(tmp_path, ["def anna"])
    found = run_benchmark(tiny_target, Request(["self_speculative"], dataset=path, max_steps=4))
    assert found.strategies[1].settings == tiny_target.run.suggested
    found = run_benchmark(tiny_target, Request(["self_speculative"], exit_layer=3, dataset=path, max_steps=4))
    assert found.strategies[1].settings == tiny_target.run.suggested | {"exit_layer": 3}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategies": []}, "--strategies: is empty"),
        ({"strategies": ["self_speculativ"]}, "did you mean 'self_speculative'"),
        ({"max_steps": 0}, "--max_steps 0: give 1 or more"),
        ({"num_samples": 0}, "--num_samples 0: give 1 or more"),
        ({"num_samples": -3}, "--num_samples -3: give 1 or more"),
        ({"batch_size": 0}, "--batch_size 0: give 1 or more"),
        ({"temperature": 0.0}, "--temperature 0.0 is not valid"),
        ({"top_p": 1.5}, "--top_p 1.5 is not valid"),
        ({"top_k": -1, "sample": True}, "--top_k -1 is not valid"),
        ({"seed": -1, "sample": False}, "--seed -1 is not valid"),
        ({"sample": False, "temperature": 0.8}, "--temperature 0.8 is for sampling"),
    ],
)
def test_a_request_that_no_model_can_meet(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Request(**fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "no rows"),
        ("\n\n", "no rows"),
        ('{"prompt": "a"}\n{"prompt": \n', "prompts.jsonl:2: not JSON"),
        ('{"prompt": ""}\n', "prompts.jsonl:1: the prompt is empty"),
        ('{"text": "a"}\n', "prompts.jsonl:1: keys"),
    ],
)
def test_a_dataset_that_cannot_be_used(
    tiny_target: Target, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        run_benchmark(tiny_target, Request(FOUR, **SETTINGS, dataset=path))


def test_more_samples_than_there_are(tiny_target: Target, tmp_path: Path) -> None:
    path = dataset(tmp_path, ["def anna", "def bert"])
    with pytest.raises(UserError, match="--num_samples 3: the dataset has only 2 prompts"):
        run_benchmark(tiny_target, Request(FOUR, **SETTINGS, dataset=path, num_samples=3))
    with pytest.raises(UserError, match="--batch_size 3: there are only 2 prompts; give 2 or less"):
        run_benchmark(tiny_target, Request(FOUR, **SETTINGS, dataset=path, batch_size=3))


@pytest.mark.parametrize("missing", ["log.jsonl", "recipe.yaml", "heldout.jsonl"])
def test_a_damaged_run_is_refused_before_anything_is_timed(
    missing: str, run_without: Callable[..., Path], calls: list[Any], tmp_path: Path
) -> None:
    target = load_target(run=str(run_without(missing)))
    path = dataset(tmp_path, ["def anna"])
    with pytest.raises(UserError, match=missing):
        run_benchmark(target, Request(FOUR, **SETTINGS, dataset=path))
    assert calls == []


def test_bfloat16_is_compared_too(finished_run: Path) -> None:
    target = load_target(run=str(finished_run), dtype="bfloat16")
    found = run_benchmark(target, Request(FOUR, **SETTINGS, num_samples=3))
    assert found.environment.dtype == "bfloat16"
    for strategy in found.strategies[1:]:
        assert strategy.compared == 3
        assert all(p.difference is None or p.difference.verdict == "tie" for p in strategy.prompts)


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


@pytest.fixture(scope="module")
def captured_report(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """With passes of fixed shape, as on a GPU, which need no compiler; profiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.target.captured", GraphRunner)
        request = Request(num_samples=3, max_steps=8, num_speculations=2, compile=True, profile=True)
        return run_benchmark(tiny_target, request)


def test_captured_strategies_stand_beside_their_eager_twins(captured_report: Report) -> None:
    names = [strategy.name for strategy in captured_report.strategies]
    assert names[:4] == ["autoregressive", "self_speculative", "hf_generate", "hf_early_exit"]
    assert names[4:] == ["autoregressive_not_compiled", "self_speculative_not_compiled"]
    assert all(strategy.equal == strategy.compared == 3 for strategy in captured_report.strategies[1:])
    assert [s.over_eager is not None for s in captured_report.strategies] == [True, True] + [False] * 4
    assert [s.over_eager for s in captured_report.sampled] == [None] * 4  # twins are greedy alone
    assert captured_report.settings["compile"] is True


def test_a_profile_has_a_row_for_each_of_ours(captured_report: Report, tmp_path: Path) -> None:
    rows = [(row.name, row.sampled) for row in captured_report.profile]
    names = ["autoregressive", "self_speculative"]
    assert rows == [(name, sampled) for sampled in (False, True) for name in names] + [
        (f"{name}_not_compiled", False) for name in names
    ]
    for row in captured_report.profile:
        assert row.steps >= 3
        assert row.overhead == pytest.approx(row.step / row.bare - 1)
    write_report(captured_report, tmp_path)
    table = (tmp_path / "table.txt").read_text()
    assert "Milliseconds a step" in table
    assert "Compiled over not compiled, self speculative: " in table
    assert max(map(len, table.splitlines())) <= 80
    assert "Over, %" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_compiled_passes_from_the_command_line(finished_run: Path, tmp_path: Path) -> None:
    """Some ten seconds of compiling for each of six passes."""
    command = [sys.executable, "-m", "eval", "benchmark", "--run", str(finished_run), "--num_samples", "2"]
    flags = [
        "--max_steps",
        "8",
        "--sample",
        "False",
        "--compile",
        "--profile",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    result = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert all(strategy.equal == strategy.compared == 2 for strategy in report.strategies[1:])
    assert len(report.profile) == 4
