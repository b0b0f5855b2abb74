"""Timing: every batch by every strategy in turn, and what each prompt got."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eval.contestants import Contestant, Key
from eval.decoding.speculate import Generation
from eval.memory import Memory, peak_memory
from eval.profile import Profile
from eval.prompts import Batch, Prompt, evenly_spaced
from eval.results import PromptResult, StepProfile
from eval.statistics import distinct_trigram_share
from eval.target import Target
from eval.titles import marked

MEMORY_REPEATS = 3
PROFILED = 8  # batches


@dataclass
class Measured:
    """One prompt's result, and the token ids that it is about."""

    result: PromptResult
    tokens: list[int] = field(default_factory=list)


Results = dict[Key, dict[int, Measured]]
"""strategy -> index of a prompt -> what came of it"""


def warm_up(contestants: Sequence[Contestant], prompt: list[int], batch_size: int) -> None:
    """Decode something that is not measured. What fails here fails there too, and is reported there."""
    for contestant in contestants:
        with suppress(Exception):
            contestant.decode([prompt] * batch_size, list(range(batch_size)))


def measure(
    contestants: Sequence[Contestant], batches: Sequence[Batch], target: Target, *, show: bool = True
) -> Results:
    """Time these batches, and afterwards, untimed, the memory of the largest of them. `show`: with a bar."""
    results = run_interleaved(contestants, batches, target, show=show)
    measure_memory(contestants, batches, results, target)
    return results


def run_interleaved(
    contestants: Sequence[Contestant], batches: Sequence[Batch], target: Target, *, show: bool = True
) -> Results:
    """Each batch by every strategy in turn, in an order that rotates, so a slow minute hits them all."""
    results: Results = {contestant.key: {} for contestant in contestants}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as progress:
        task = progress.add_task("benchmark", total=len(batches) * len(contestants))
        for turn, batch in enumerate(batches):
            shift = turn % len(contestants)
            for contestant in [*contestants[shift:], *contestants[:shift]]:
                results[contestant.key] |= decode_batch(contestant, batch, target)
                progress.advance(task)
    return results


def merged(shares: Sequence[Results]) -> Results:
    """What several processes measured, each with its own prompts, as one."""
    return {key: {index: one for share in shares for index, one in share[key].items()} for key in shares[0]}


def decode_batch(contestant: Contestant, batch: Batch, target: Target) -> dict[int, Measured]:
    """Decode one batch; a failure is a result too, of every prompt in it."""
    try:
        generations = contestant.decode(batch.tokens, batch.streams)
    except Exception as error:  # whatever happens to one batch must not lose the others
        reason = described(error)
        if len(batch.prompts) > 1:
            reason = f"its batch of {len(batch.prompts)} prompts: {reason}"
        return {p.index: failure(p, reason, batch.number) for p in batch.prompts}
    return {
        prompt.index: Measured(
            _result(contestant, prompt, batch.number, generation, target), generation.tokens
        )
        for prompt, generation in zip(batch.prompts, generations, strict=True)
    }


def described(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def failure(prompt: Prompt, reason: str, batch: int | None = None) -> Measured:
    """What a prompt gets that could not be decoded."""
    return Measured(
        PromptResult(index=prompt.index, source=prompt.source, batch=batch, status="failed", error=reason)
    )


def _result(
    contestant: Contestant, prompt: Prompt, batch: int, generation: Generation, target: Target
) -> PromptResult:
    apart = contestant.ours  # transformers does not tell prefill from decode
    return PromptResult(
        index=prompt.index,
        source=prompt.source,
        batch=batch,
        prompt_tokens=len(prompt.tokens),
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


def profile(contestants: Sequence[Contestant], batches: Sequence[Batch]) -> list[StepProfile]:
    """Where the time of the own strategies goes, over some of the batches, each by every strategy in turn."""
    chosen = evenly_spaced(batches, min(PROFILED, len(batches)))
    ours = [(contestant, contestant.profile) for contestant in contestants if contestant.profile is not None]
    found = {contestant.key: Profile() for contestant, _ in ours}
    for batch in chosen:
        for contestant, run in ours:
            with suppress(Exception):  # what fails here failed when it was timed, and was reported
                found[contestant.key] += run(batch.tokens, batch.streams)
    return [
        StepProfile(
            name=contestant.name,
            label=marked(contestant),
            sampled=contestant.sampled,
            steps=total.steps,
            step=total.plain / total.steps,
            phases={phase: seconds / total.steps for phase, seconds in total.seconds.items()},
            python=total.python / total.steps,
            bare=total.bare / total.steps,
            overhead=total.overhead,
        )
        for contestant, _ in ours
        if (total := found[contestant.key]).steps
    ]


def measure_memory(
    contestants: Sequence[Contestant], batches: Sequence[Batch], results: Results, target: Target
) -> None:
    """Note what memory each strategy takes for the batch with the most room, padding included.

    Decodes of their own, because measuring would make timed ones slower; the median of a few, in turn. What
    failed when it was timed is not tried again.
    """
    largest = max(batches, key=lambda batch: len(batch.prompts) * max(map(len, batch.tokens)))
    decoded = {key: [found[prompt.index] for prompt in largest.prompts] for key, found in results.items()}
    able = [c for c in contestants if all(one.result.status == "ok" for one in decoded[c.key])]
    used: dict[Key, list[Memory]] = {contestant.key: [] for contestant in able}
    for _ in range(MEMORY_REPEATS):
        for contestant in able:
            with suppress(Exception):  # a strategy that fails only now has no numbers here, and all others
                work = partial(contestant.decode, largest.tokens, largest.streams)
                memory = peak_memory(work, target.runner.device)
                used[contestant.key] += [memory] if memory is not None else []
    for key, memories in used.items():
        if memories:
            middle = sorted(memories, key=attrgetter("added"))[len(memories) // 2]
            noted = {"peak_bytes": middle.peak, "added_bytes": middle.added}
            for one in decoded[key]:
                one.result = one.result.model_copy(update=noted)
