"""The protocol: warm-up, rotation, comparison, failures, and what a report then holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval import Request, load_target, run_benchmark, write_report
from eval.results import Report
from eval.target import Target
from layerskip_model.errors import UserError
from tests.eval.benchmarks import FOUR, SETTINGS, by_name, dataset, spy_on


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """The prompts of every decode of the benchmark in order: strategy and prompt."""
    seen: list[tuple[str, list[int]]] = []
    spy_on(monkeypatch, lambda name, prompt: seen.append((name, prompt)))
    return seen


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
    for names, wanted in ((["greedy"], []), (["hf_generate"], ["hf_generate"])):
        found = run_benchmark(tiny_target, Request(names, max_steps=10, sample=False, dataset=path))
        assert [strategy.name for strategy in found.strategies] == ["autoregressive", *wanted]
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
    found = run_benchmark(
        tiny_target, Request(["self_speculative"], settings={"exit_layer": 3}, dataset=path, max_steps=4)
    )
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
