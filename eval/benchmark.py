"""The benchmark: every strategy on the same prompts, interleaved, compared token by token, with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eval.clock import now
from eval.contestants import Contestant, contestant_name, make_contestant
from eval.decoding.acceptance import Greedy
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
STRATEGIES = (BASELINE, "self_speculative", "hf_generate", "hf_early_exit")
HELDOUT = "heldout"
NUM_SAMPLES = 32
SEED = 0  # of the bootstrap
VERIFY_COST_REPEATS = 25


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        strategies: names of `eval.contestants`; the baseline is added when it is missing.
        exit_layer, num_speculations: for the strategies that take them; default: the run's suggestion.
        dataset: a JSONL file, or "heldout" for the held-out rows of the run that made the model.
        num_samples: prompts; default: NUM_SAMPLES, or all of a file that has fewer.
        max_steps: new tokens a prompt.

    Raises UserError for what is wrong on any model.
    """

    strategies: Sequence[str] = STRATEGIES
    exit_layer: int | None = None
    num_speculations: int | None = None
    dataset: str | Path = HELDOUT
    num_samples: int | None = None
    max_steps: int = 128

    def __post_init__(self) -> None:
        if not self.strategies:
            raise UserError(f"--strategies: is empty; name some, such as {','.join(STRATEGIES)}")
        for name in self.strategies:
            contestant_name(name)
        for flag in ("num_samples", "max_steps"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise UserError(f"--{flag} {value}: give 1 or more")


def run_benchmark(target: Target, request: Request) -> Report:
    """Run the protocol and return the report. Raises UserError for what the user can mend, before timing anything.

    A prompt that a strategy fails on is reported as failed and takes part in no ratio.
    """
    # 1. Everything that can be refused is refused now.
    given = settings_for(target, request)
    names = dict.fromkeys([BASELINE, *map(contestant_name, request.strategies)])
    contestants = [make_contestant(name, target, request.max_steps, given) for name in names]
    dataset = dataset_path(target, request.dataset)
    rows = read_prompts(dataset)
    chosen = evenly_spaced(rows, request.num_samples)
    prompts = [target.encode(row.prompt) for row in chosen]
    warm_up = warm_up_prompt(target, rows, chosen)
    run = target.run
    texts = heldout_texts(run.heldout) if run is not None else []
    training = run.training_points() if run is not None else None
    length = run.length if run is not None else 0

    # 2. Warm up on a prompt that is not measured. What fails here fails there too, and is reported there.
    for contestant in contestants:
        with suppress(Exception):
            contestant.decode(warm_up)

    # 3. Time, compare, and say what came of it.
    results = run_interleaved(contestants, prompts, chosen, target)
    judge(results, prompts, Examiner(target))
    baseline = [measured.result for measured in results[BASELINE]]
    strategies = [
        conclude(target, contestant, results[contestant.name], None if i == 0 else baseline)
        for i, contestant in enumerate(contestants)
    ]
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
        exits=measure_exits(target.model, target.tokenizer, texts, length) if run is not None else None,
        training=training,
    )


def settings_for(target: Target, request: Request) -> dict[str, Any]:
    """The settings asked for, with the run's suggestion where none was given."""
    suggested = target.run.suggested if target.run is not None else {}
    given = {"exit_layer": request.exit_layer, "num_speculations": request.num_speculations}
    return {key: suggested.get(key) if value is None else value for key, value in given.items()}


def dataset_path(target: Target, dataset: str | Path) -> Path:
    """The file of prompts. Raises UserError for "heldout" without a run that left one."""
    if str(dataset) != HELDOUT:
        return Path(dataset)
    if target.run is None:
        raise UserError(
            f"--dataset heldout: '{target.name}' lies in no training run; name a JSONL file of prompts"
        )
    return target.run.heldout


def evenly_spaced(rows: list[PromptRow], count: int | None) -> list[PromptRow]:
    """`count` rows from all over the file. Raises UserError where it has fewer."""
    count = min(NUM_SAMPLES, len(rows)) if count is None else count
    if count > len(rows):
        raise UserError(f"--num_samples {count}: the dataset has only {len(rows)} prompts; give {len(rows)}")
    return [rows[i * len(rows) // count] for i in range(count)]


def warm_up_prompt(target: Target, rows: list[PromptRow], chosen: list[PromptRow]) -> list[int]:
    """A prompt that is not among the chosen ones; half of one where all are.

    Raises UserError where no chosen prompt fits the model's context: there is nothing to measure.
    """
    room = target.runner.context_length - 1
    fitting = [tokens for row in chosen if len(tokens := target.encode(row.prompt)) <= room]
    if not fitting:
        raise UserError(
            f"no prompt of the dataset fits the model's context of {room + 1} tokens; give shorter ones"
        )
    lines = {row.line for row in chosen}
    for row in rows:
        if row.line not in lines and len(tokens := target.encode(row.prompt)) <= room:
            return tokens
    return fitting[0][: max(1, len(fitting[0]) // 2)]


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
    """Decode one prompt; a failure is a result too."""
    source = f"{row.source}:{row.line}"
    try:
        generation = contestant.decode(prompt)
    except Exception as error:  # whatever happens to one prompt must not lose the others
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Measured(PromptResult(index=index, source=source, status="failed", error=reason), [])
    return Measured(_result(contestant, index, source, prompt, generation, target), generation.tokens)


def _result(
    contestant: Contestant,
    index: int,
    source: str,
    prompt: list[int],
    generation: Generation,
    target: Target,
) -> PromptResult:
    apart = contestant.ours  # transformers does not tell prefill from decode
    return PromptResult(
        index=index,
        source=source,
        prompt_tokens=len(prompt),
        new_tokens=len(generation.tokens),
        seconds=generation.prefill_seconds + generation.decode_seconds,
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
    middles = [r.prompt_tokens + r.new_tokens / 2 for r in results if r.status == "ok"]
    length = int(statistics.median(middles))
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
    state = State(runner, [[1] * length], length, rows, Greedy())
    hidden = runner.embed(torch.ones((1, length), dtype=torch.long, device=runner.device))
    runner.run(hidden, 0, runner.num_layers, state.chain_context(0, length))
    state.cache.lengths = [length]
    state.begin_step([1], [rows], [False])
    seconds: dict[int, list[float]] = {1: [], rows: []}
    for _ in range(VERIFY_COST_REPEATS):
        for count in seconds:
            hidden = runner.embed(torch.ones((1, count), dtype=torch.long, device=runner.device))
            began = now(runner.device)
            runner.run(hidden, exit_layer, runner.num_layers, state.chain_context(0, count))
            seconds[count].append(now(runner.device) - began)
    return statistics.median(seconds[rows]) / statistics.median(seconds[1])
