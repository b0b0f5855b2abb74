"""The benchmark: every strategy on the same prompts, interleaved, compared token by token, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.choosing import Choosing, peer_config
from eval.contestants import NOT_COMPILED, Contestant, make_contestant, not_compiled
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
from eval.strategy_spec import BASELINE, EXITS, PEERS, Spec, check_given, parse_spec
from eval.summary import rivals, summarise, with_ratio
from eval.target import Target, with_captured_passes
from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_prompts

OF_EXITS = (EXITS, "prompt_lookup", "hf_generate", "hf_early_exit", "hf_prompt_lookup")
"""What a model that exits early is measured with when nothing is asked for; also one that no run made."""
ACCEPTANCE = ("acceptance", "posterior_threshold", "posterior_alpha")
TEMPERATURE = 0.8  # of what is measured beside the greedy table


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        strategies: entries as `eval.strategy_spec` reads them; the baseline is added when it is missing. None: by
            what the run suggests, and transformers' own.
        settings: for all the strategies that take them; an entry's own come first, the run's suggestion last.
        dataset: a JSONL file, or "heldout" for the held-out rows of the run that made the model.
        num_samples: prompts; default: 32, or all of a file that has fewer.
        max_steps: new tokens a prompt.
        batch_size: prompts decoded together.
        sample: False for greedy decoding alone, True for sampling alone, None for both.
        temperature: of the sampling; default: TEMPERATURE.
        top_k, top_p: of the sampling; default: the checkpoint's own.
        acceptance, posterior_threshold, posterior_alpha: of the sampling (`eval.choosing`).
        seed: of all that is drawn, the bootstrap's samples too.
        compile: whether passes are captured (`eval.decoding.capture`); greedy ones are measured without, too.
        profile: whether to say where the steps' time goes.

    Raises UserError for what is wrong on any model.
    """

    strategies: Sequence[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    dataset: str | Path = HELDOUT
    num_samples: int | None = None
    max_steps: int = 128
    batch_size: int = 1
    sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    acceptance: str = "lossless"
    posterior_threshold: float | None = None
    posterior_alpha: float | None = None
    seed: int = 0
    compile: bool = False
    profile: bool = False

    def __post_init__(self) -> None:
        if self.strategies is not None:
            if not self.strategies:
                raise UserError(f"--strategies: is empty; name some, such as {','.join(OF_EXITS)}")
            check_given(self.specs(self.strategies), self.settings)
        for flag in ("num_samples", "max_steps", "batch_size"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise UserError(f"--{flag} {value}: give 1 or more")
        self.choosings()

    def specs_for(self, target: Target) -> list[Spec]:
        """The entries to measure on a target. Raises UserError."""
        if self.strategies is not None:
            return self.specs(self.strategies)
        run = target.run
        own = None if run is None or run.strategy == EXITS else run.strategy
        specs = self.specs(
            OF_EXITS if own is None else (own, "prompt_lookup", "hf_generate", "hf_prompt_lookup")
        )
        check_given(specs, self.settings)
        return specs

    def specs(self, entries: Sequence[str]) -> list[Spec]:
        """The entries, the baseline among them. Raises UserError."""
        specs = [parse_spec(text) for text in entries]
        return specs if Spec(BASELINE) in specs else [Spec(BASELINE), *specs]

    def choosings(self) -> list[Choosing]:
        """The ways of choosing tokens that are measured, greedy first. Raises UserError."""
        given: dict[str, Any] = {
            name: getattr(self, name) for name in ("top_k", "top_p", "seed", *ACCEPTANCE)
        }
        if self.sample is False:
            return [Choosing(False, self.temperature, **given)]
        sampling = Choosing(True, TEMPERATURE if self.temperature is None else self.temperature, **given)
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
    judge(target, contestants, results, prompts)
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
        rivals=rivals(strategies, request.seed),
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
    specs = request.specs_for(target)
    skipped = {
        str(spec): PEERS[spec.name].one_prompt_only
        for spec in specs
        if request.batch_size > 1 and spec.name in PEERS and PEERS[spec.name].one_prompt_only
    }

    def made(target: Target, specs: list[Spec], choosing: Choosing) -> list[Contestant]:
        return [make_contestant(s, target, request.max_steps, request.settings, choosing) for s in specs]

    taking_part = [spec for spec in specs if str(spec) not in skipped]
    contestants = [one for choosing in request.choosings() for one in made(target, taking_part, choosing)]
    check_different(contestants)
    if request.compile:
        ours = [spec for spec in taking_part if spec.name in STRATEGIES]
        contestants += map(not_compiled, made(eager, ours, request.choosings()[0]))
    return contestants, skipped


def check_different(contestants: Sequence[Contestant]) -> None:
    """Raises UserError where two entries are one strategy with the same settings."""
    for place, one in enumerate(contestants):
        for other in contestants[:place]:
            if (one.strategy, one.settings, one.choosing) == (other.strategy, other.settings, other.choosing):
                raise UserError(
                    f"--strategies: '{other.name}' and '{one.name}' are the same; give one of them"
                )


def choosing_settings(target: Target, request: Request) -> dict[str, dict[str, Any]]:
    """How tokens were chosen, in transformers' words: "greedy" and "sampling", those that were measured.

    With typical acceptance, which it lacks, the sampling has that too, and its threshold and alpha.
    """
    return {
        "sampling" if choosing.sample else "greedy": peer_config(target, choosing)
        | ({} if choosing.lossless else dict(zip(ACCEPTANCE, ("typical", *choosing.typical), strict=True)))
        for choosing in request.choosings()
    }


def judge(
    target: Target, contestants: Sequence[Contestant], results: Results, prompts: Sequence[Prompt]
) -> None:
    """Compare outputs with the baseline's, token by token, where they have to be equal."""
    examiners = {one.sampled: Examiner(target, one.choosing) for one in contestants if one.name == BASELINE}
    for contestant in contestants:
        if contestant.name == BASELINE or not contestant.same_tokens:
            continue
        for index, ours in results[contestant.key].items():
            reference = results[BASELINE, contestant.sampled][index]
            if "failed" in (ours.result.status, reference.result.status):
                continue
            prompt, examiner = prompts[index].tokens, examiners[contestant.sampled]
            difference = examiner.compare(prompt, reference.tokens, ours.tokens, index)
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
            strategy=contestant.strategy,
            label=contestant.label,
            variant=contestant.variant,
            lossless=contestant.lossless,
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
