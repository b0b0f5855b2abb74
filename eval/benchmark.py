"""The benchmark: every strategy on the same prompts, interleaved, compared token by token, with intervals."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eval.contestants import Contestant, make_contestant
from eval.decoding.drafters.base import State
from eval.decoding.speculate import Generation
from eval.differences import Examiner
from eval.environment import describe_environment
from eval.exits import heldout_texts, measure_exits
from eval.results import PromptResult, Report, StrategyResult, summarise
from eval.statistics import distinct_trigram_share, predicted_self_speculation_speedup
from eval.target import Target
from layerskip_model.errors import UserError
from layerskip_model.jsonl import PromptRow, read_prompts

BASELINE = "autoregressive"
SEED = 0  # of the bootstrap
VERIFY_COST_REPEATS = 25


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        strategies: names of `eval.contestants`; the baseline is added when it is missing.
        exit_layer, num_speculations: for the strategies that take them; default: the run's suggestion.
        dataset: a JSONL file, or "heldout" for the held-out rows of the run that made the model.
        num_samples, max_steps: prompts, and new tokens each.
    """

    strategies: Sequence[str]
    exit_layer: int | None
    num_speculations: int | None
    dataset: str
    num_samples: int
    max_steps: int


def benchmark(target: Target, request: Request) -> Report:
    """Run the protocol and return the report. Raises UserError for what the user can mend, before timing anything.

    A prompt that a strategy fails on is reported as failed and takes part in no ratio.
    """
    given = settings_for(target, request)
    names = list(dict.fromkeys([BASELINE, *request.strategies]))
    contestants = [make_contestant(name, target, request.max_steps, given) for name in names]
    dataset = dataset_path(target, request.dataset)
    rows = read_prompts(dataset)
    chosen = evenly_spaced(rows, request.num_samples)
    prompts = [target.encode(row.prompt) for row in chosen]
    for contestant in contestants:  # warm-up, on a prompt that is not measured
        contestant.decode(warm_up_prompt(target, rows, chosen))
    results = run_interleaved(contestants, prompts, chosen, target)
    judge(results, prompts, Examiner(target))
    baseline = [measured.result for measured in results[BASELINE]]
    strategies = [
        conclude(target, contestant, results[contestant.name], None if i == 0 else baseline, prompts)
        for i, contestant in enumerate(contestants)
    ]
    run = target.run
    texts = heldout_texts(run.heldout) if run is not None else []
    return Report(
        title=f"Decoding {Path(target.name).name if run is None else run.directory.name}",
        model=target.name,
        baseline=BASELINE,
        environment=describe_environment(target, SEED),
        settings={
            "dataset": str(dataset),
            "num_samples": len(chosen),
            "max_steps": request.max_steps,
            "sampling": "greedy",
            "batch": 1,
        },
        strategies=strategies,
        exits=measure_exits(target.model, target.tokenizer, texts, run.length) if run is not None else None,
        training=run.training_points() if run is not None else None,
    )


def settings_for(target: Target, request: Request) -> dict[str, Any]:
    """The settings asked for, with the run's suggestion where none was given."""
    suggested = target.run.suggested if target.run is not None else {}
    given = {"exit_layer": request.exit_layer, "num_speculations": request.num_speculations}
    return {key: suggested.get(key) if value is None else value for key, value in given.items()}


def dataset_path(target: Target, dataset: str) -> Path:
    """The file of prompts. Raises UserError for "heldout" without a run that left one."""
    if dataset != "heldout":
        return Path(dataset)
    if target.run is None:
        raise UserError(
            f"--dataset heldout: '{target.name}' lies in no training run; name a JSONL file of prompts"
        )
    return target.run.heldout


def evenly_spaced(rows: list[PromptRow], count: int) -> list[PromptRow]:
    """`count` rows from all over the file. Raises UserError where it has fewer."""
    if count < 1:
        raise UserError(f"--num_samples {count}: give 1 or more")
    if count > len(rows):
        raise UserError(f"--num_samples {count}: {rows[0].source} has only {len(rows)} prompts")
    return [rows[i * len(rows) // count] for i in range(count)]


def warm_up_prompt(target: Target, rows: list[PromptRow], chosen: list[PromptRow]) -> list[int]:
    """A prompt that is not among the chosen ones; half of one where all are."""
    lines = {row.line for row in chosen}
    others = [row for row in rows if row.line not in lines]
    if others:
        return target.encode(others[0].prompt)
    tokens = target.encode(chosen[0].prompt)
    return tokens[: max(1, len(tokens) // 2)]


@dataclass
class Measured:
    """One prompt's result, and the token ids that it is about."""

    result: PromptResult
    tokens: list[int]


def run_interleaved(
    contestants: list[Contestant], prompts: list[list[int]], rows: list[PromptRow], target: Target
) -> dict[str, list[Measured]]:
    """Each prompt by every strategy in turn, in an order that rotates, so a slow minute hits them all."""
    results: dict[str, list[Measured]] = {contestant.name: [] for contestant in contestants}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("benchmark", total=len(prompts) * len(contestants))
        for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            shift = index % len(contestants)
            for contestant in contestants[shift:] + contestants[:shift]:
                results[contestant.name].append(measure(contestant, index, prompt, row, target))
                progress.advance(task)
    return results


def measure(
    contestant: Contestant, index: int, prompt: list[int], row: PromptRow, target: Target
) -> Measured:
    """Decode and time one prompt; a failure is a result too."""
    source = f"{Path(row.source).name}:{row.line}"
    began = time.perf_counter()
    try:
        generation = contestant.decode(prompt)
    except Exception as error:  # whatever happens to one prompt must not lose the others
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Measured(PromptResult(index=index, source=source, status="failed", error=reason), [])
    seconds = time.perf_counter() - began
    return Measured(
        _result(contestant, index, source, prompt, generation, seconds, target), generation.tokens
    )


def _result(
    contestant: Contestant,
    index: int,
    source: str,
    prompt: list[int],
    generation: Generation,
    seconds: float,
    target: Target,
) -> PromptResult:
    apart = contestant.ours  # transformers does not tell prefill from decode
    return PromptResult(
        index=index,
        source=source,
        prompt_tokens=len(prompt),
        new_tokens=len(generation.tokens),
        seconds=generation.prefill_seconds + generation.decode_seconds if apart else seconds,
        prefill_seconds=generation.prefill_seconds if apart else None,
        decode_seconds=generation.decode_seconds if apart else None,
        finish_reason=generation.finish_reason,
        target_forwards=generation.target_forwards if apart else None,
        accepted_lengths=generation.accepted_lengths,
        drafted=generation.drafted,
        accepted=generation.accepted,
        proposals_at=generation.proposals_at,
        accepted_at=generation.accepted_at,
        distinct_trigram_share=distinct_trigram_share([generation.tokens]),
        text=str(target.tokenizer.decode(generation.tokens)),
    )


def judge(results: dict[str, list[Measured]], prompts: list[list[int]], examiner: Examiner) -> None:
    """Compare every output with the baseline's, token by token."""
    for name, measured in results.items():
        if name == BASELINE:
            continue
        for prompt, ours, reference in zip(prompts, measured, results[BASELINE], strict=True):
            if "failed" in (ours.result.status, reference.result.status):
                continue
            difference = examiner.compare(prompt, reference.tokens, ours.tokens)
            ours.result = ours.result.model_copy(
                update={"tokens_equal": difference is None, "difference": difference}
            )


def conclude(
    target: Target,
    contestant: Contestant,
    measured: list[Measured],
    baseline: list[PromptResult] | None,
    prompts: list[list[int]],
) -> StrategyResult:
    """A strategy's summary; for self-speculation with the speedup that its acceptance predicts."""
    results = [one.result for one in measured]
    summary = summarise(
        contestant.name,
        results,
        baseline,
        label=contestant.label,
        lossless=True,
        chain=contestant.ours,
        settings=contestant.settings,
        seed=SEED,
    )
    if contestant.name != "self_speculative" or summary.acceptance_length is None:
        return summary
    exit_layer, drafts = contestant.settings["exit_layer"], contestant.settings["num_speculations"]
    length = int(statistics.median(len(p) + r.new_tokens / 2 for p, r in zip(prompts, results, strict=True)))
    cost = verify_cost(target, exit_layer, drafts + 1, length)
    accepted = min(summary.acceptance_length - 1.0, drafts)
    predicted = predicted_self_speculation_speedup(
        accepted, drafts, exit_layer, target.runner.num_layers, cost
    )
    return summary.model_copy(update={"predicted_speedup": predicted, "verify_cost": cost})


@torch.inference_mode()
def verify_cost(target: Target, exit_layer: int, rows: int, length: int) -> float:
    """v: the upper layers' time for `rows` rows after `length` cached tokens, over that for one row."""
    runner = target.runner
    length = max(1, min(length, runner.context_length - rows))
    state = State(runner, 1, length, rows)
    hidden = runner.embed(torch.ones((1, length), dtype=torch.long, device=runner.device))
    runner.run(hidden, 0, runner.num_layers, state.chain_context(0, length))
    state.cache.lengths = [length]
    state.begin_step([1], [rows], [False])
    seconds: dict[int, list[float]] = {1: [], rows: []}
    for _ in range(VERIFY_COST_REPEATS):
        for count in seconds:
            hidden = runner.embed(torch.ones((1, count), dtype=torch.long, device=runner.device))
            began = _now(runner.device)
            runner.run(hidden, exit_layer, runner.num_layers, state.chain_context(0, count))
            seconds[count].append(_now(runner.device) - began)
    return statistics.median(seconds[rows]) / statistics.median(seconds[1])


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
