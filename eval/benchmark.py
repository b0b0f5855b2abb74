"""The benchmark: every strategy on the same prompts, interleaved, compared token by token, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.choosing import Choosing, peer_config
from eval.contestants import (
    NOT_COMPILED,
    ONE_PROMPT_ONLY,
    Contestant,
    contestant_name,
    make_contestant,
    not_compiled,
)
from eval.decoding.strategies import STRATEGIES
from eval.differences import Examiner
from eval.environment import describe_environment
from eval.exits import heldout_texts, measure_exits
from eval.measure import Results, described, failure, measure, merged, profile, warm_up
from eval.memory import weight_bytes
from eval.prediction import with_prediction
from eval.prompts import (
    HELDOUT,
    Prompt,
    dataset_path,
    encode_prompts,
    evenly_spaced,
    make_batches,
    warm_up_prompt,
)
from eval.ranks import ALONE, Ranks
from eval.results import Report, StrategyResult
from eval.summary import summarise, with_ratio
from eval.target import Target, with_captured_passes
from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_prompts

BASELINE = "autoregressive"
DEFAULT = (BASELINE, "self_speculative", "hf_generate", "hf_early_exit")
TEMPERATURE = 0.8  # of what is measured beside the greedy table


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        strategies: names of `eval.contestants`; the baseline is added when it is missing.
        exit_layer, num_speculations: for the strategies that take them; default: the run's suggestion.
        dataset: a JSONL file, or "heldout" for the held-out rows of the run that made the model.
        num_samples: prompts; default: 32, or all of a file that has fewer.
        max_steps: new tokens a prompt.
        batch_size: prompts decoded together.
        sample: False for greedy decoding alone, True for sampling alone, None for both.
        temperature: of the sampling; default: TEMPERATURE.
        top_k, top_p: of the sampling; default: the checkpoint's own.
        seed: of all that is drawn, the bootstrap's samples too.
        compile: whether passes are captured (`eval.decoding.capture`); greedy ones are measured without, too.
        profile: whether to say where the steps' time goes.

    Raises UserError for what is wrong on any model.
    """

    strategies: Sequence[str] = DEFAULT
    exit_layer: int | None = None
    num_speculations: int | None = None
    dataset: str | Path = HELDOUT
    num_samples: int | None = None
    max_steps: int = 128
    batch_size: int = 1
    sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    compile: bool = False
    profile: bool = False

    def __post_init__(self) -> None:
        if not self.strategies:
            raise UserError(f"--strategies: is empty; name some, such as {','.join(DEFAULT)}")
        for name in self.strategies:
            contestant_name(name)
        for flag in ("num_samples", "max_steps", "batch_size"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise UserError(f"--{flag} {value}: give 1 or more")
        self.choosings()

    def choosings(self) -> list[Choosing]:
        """The ways of choosing tokens that are measured, greedy first. Raises UserError."""
        if self.sample is False:
            return [Choosing(False, self.temperature, self.top_k, self.top_p, self.seed)]
        temperature = TEMPERATURE if self.temperature is None else self.temperature
        sampling = Choosing(True, temperature, self.top_k, self.top_p, self.seed)
        return [sampling] if self.sample else [Choosing(seed=self.seed), sampling]


def run_benchmark(target: Target, request: Request) -> Report:
    """Run the protocol and return the report. Raises UserError for what the user can mend, before timing anything.

    A prompt that a strategy fails on is reported as failed, with all of its batch, and takes part in no ratio.
    A prompt that no strategy could decode is reported as failed and comes into no batch.
    """
    report = run_together(target, request, ALONE)
    assert report is not None
    return report


def run_together(target: Target, request: Request, ranks: Ranks) -> Report | None:
    """`run_benchmark` with the batches split over processes; the report is the first one's, None the others'."""
    # 1. Everything that can be refused is refused now.
    if request.batch_size > 1 and not target.runner.takes_masks:
        raise UserError(
            f"--batch_size {request.batch_size}: {target.model.config._attn_implementation} decodes one text at a "
            "time; give --attn_implementation sdpa"
        )
    eager = target
    if request.compile:
        target = with_captured_passes(target)
    contestants, skipped = make_contestants(target, request, eager)
    dataset = dataset_path(target, request.dataset)
    rows = read_prompts(dataset)
    chosen = evenly_spaced(rows, request.num_samples)
    prompts = encode_prompts(target, chosen)
    batches, unfit = make_batches(target, prompts, request.batch_size)
    aside = warm_up_prompt(target, rows, chosen)
    share = ranks.share(batches)
    run = target.run
    texts = heldout_texts(run.heldout) if run is not None else []
    training = run.training_points() if run is not None else None
    length = run.length if run is not None else 0

    # 2. Warm up on a prompt that is not measured.
    warm_up(contestants, aside, request.batch_size)

    # 3. Time, compare, and say what came of it.
    shares = ranks.exchange(measure(contestants, share, target, show=ranks.is_first))
    if not ranks.is_first:
        return None
    results = merged(shares)
    for found in results.values():
        found |= {index: failure(prompts[index], described(error)) for index, error in unfit.items()}
    judge(results, prompts, Examiner(target))
    strategies = conclude(target, contestants, results, request.seed)
    profiles = profile(contestants, share) if request.profile else []
    return Report(
        title=f"Decoding {Path(target.name).name if run is None else run.directory.name}",
        model=target.name,
        baseline=BASELINE,
        environment=describe_environment(target, request.seed),
        settings={
            "dataset": str(dataset),
            "num_samples": len(chosen),
            "max_steps": request.max_steps,
            "batch_size": request.batch_size,
            "compile": request.compile,
            "weight_bytes": weight_bytes(target.model, target.runner.device),
            **ranks.settings(target.runner.device),
            **choosing_settings(target, request),
        },
        strategies=[strategy for strategy in strategies if not strategy.sampled],
        sampled=[strategy for strategy in strategies if strategy.sampled],
        skipped=skipped,
        profile=profiles,
        exits=measure_exits(target.model, target.tokenizer, texts, length) if run is not None else None,
        training=training,
    )


def make_contestants(
    target: Target, request: Request, eager: Target
) -> tuple[list[Contestant], dict[str, str]]:
    """The strategies to measure, greedy and sampled as asked for, and by name why others are left out.

    Where the target's passes are captured, the first of them are measured with `eager` too.
    """
    given = settings_for(target, request)
    names = dict.fromkeys([BASELINE, *map(contestant_name, request.strategies)])
    skipped = {name: ONE_PROMPT_ONLY[name] for name in names if name in ONE_PROMPT_ONLY}
    skipped = skipped if request.batch_size > 1 else {}
    contestants = [
        make_contestant(name, target, request.max_steps, given, choosing)
        for choosing in request.choosings()
        for name in names
        if name not in skipped
    ]
    if request.compile:
        first = request.choosings()[0]
        twins = [
            make_contestant(name, eager, request.max_steps, given, first)
            for name in names
            if name in STRATEGIES
        ]
        contestants += map(not_compiled, twins)
    return contestants, skipped


def settings_for(target: Target, request: Request) -> dict[str, Any]:
    """The settings asked for, with the run's suggestion where none was given."""
    suggested = target.run.suggested if target.run is not None else {}
    given = {"exit_layer": request.exit_layer, "num_speculations": request.num_speculations}
    return {key: suggested.get(key) if value is None else value for key, value in given.items()}


def choosing_settings(target: Target, request: Request) -> dict[str, dict[str, Any]]:
    """How tokens were chosen, in transformers' words: "greedy" and "sampling", those that were measured."""
    return {
        "sampling" if choosing.sample else "greedy": peer_config(target, choosing)
        for choosing in request.choosings()
    }


def judge(results: Results, prompts: Sequence[Prompt], examiner: Examiner) -> None:
    """Compare every greedy output with the baseline's, token by token. What is drawn may differ."""
    for (name, sampled), measured in results.items():
        if name == BASELINE or sampled:
            continue
        for index, ours in measured.items():
            reference = results[BASELINE, sampled][index]
            if "failed" in (ours.result.status, reference.result.status):
                continue
            difference = examiner.compare(prompts[index].tokens, reference.tokens, ours.tokens)
            ours.result = ours.result.model_copy(
                update={"tokens_equal": difference is None, "difference": difference}
            )


def conclude(
    target: Target, contestants: Sequence[Contestant], results: Results, seed: int
) -> list[StrategyResult]:
    """Each strategy's summary; for self-speculation with the speedup that its acceptance predicts."""
    found = {key: [measured[i].result for i in sorted(measured)] for key, measured in results.items()}
    summaries = [
        summarise(
            contestant.name,
            found[contestant.key],
            None if contestant.name == BASELINE else found[BASELINE, contestant.choosing.sample],
            label=contestant.label,
            lossless=True,
            chain=contestant.ours,
            settings=contestant.settings,
            sampled=contestant.choosing.sample,
            weight_bytes=weight_bytes(target.model, target.runner.device),
            seed=seed,
        )
        for contestant in contestants
    ]
    summaries = [with_prediction(target, summary) for summary in summaries]
    twins = {
        (s.name.removesuffix(NOT_COMPILED), s.sampled): s for s in summaries if s.name.endswith(NOT_COMPILED)
    }
    return [with_ratio(summary, twins.get((summary.name, summary.sampled)), seed) for summary in summaries]
