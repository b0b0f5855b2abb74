"""How measured prompts become a strategy's summary. What is timed is a batch, so that is what is resampled."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from eval.results import PromptResult, Rivals, StrategyResult
from eval.statistics import median_ratio, pooled_rate, pooled_ratio
from eval.strategy_spec import PEERS

Decoded = Sequence[PromptResult]  # the prompts of one batch


def summarise(
    name: str,
    prompts: Sequence[PromptResult],
    baseline: Sequence[PromptResult] | None,
    *,
    strategy: str,
    label: str,
    variant: Sequence[str] = (),
    lossless: bool,
    settings: dict[str, Any],
    sampled: bool = False,
    weight_bytes: int = 0,
    seed: int = 0,
) -> StrategyResult:
    """The summary of one strategy over its prompts.

    baseline: the baseline's prompts, matched by batch; None where this is the baseline. variant: those of its
    settings that are its alone. weight_bytes: of the model, for the ratio of memory. seed is the bootstrap's.
    Raises ValueError where two prompts share an index.
    """
    for side in (prompts, baseline or []):
        if len({p.index for p in side}) != len(side):
            raise ValueError(f"two prompts of {name} or its baseline share an index")
    ok = [p for p in prompts if p.status == "ok"]
    batches = by_batch(prompts)
    timed = [batch for batch in batches if batch[0].seconds > 0]
    pairs = _comparable(batches, by_batch(baseline)) if baseline is not None else []
    lengths = [length for p in ok for length in p.accepted_lengths]
    drafted = sum(p.drafted for p in ok)
    in_chains = drafted == sum(sum(p.proposals_at) for p in ok)  # for which alone acceptance has a rate
    prefills = [batch[0].prefill_seconds for batch in batches if batch[0].prefill_seconds is not None]
    shares = [p.distinct_trigram_share for p in ok if p.distinct_trigram_share is not None]
    columns = _speedup_columns(pairs)
    return StrategyResult(
        name=name,
        strategy=strategy,
        label=label,
        variant=list(variant),
        lossless=lossless,
        sampled=sampled,
        settings=settings,
        prompts=list(prompts),
        tokens_per_second=pooled_rate([_tokens(b) for b in timed], [b[0].seconds for b in timed], seed)
        if timed
        else None,
        prefill_seconds=median(prefills) if prefills else None,
        speedup_median=median_ratio(*columns, seed=seed) if pairs else None,
        speedup_pooled=pooled_ratio(*columns, seed=seed) if pairs else None,
        acceptance_length=sum(lengths) / len(lengths) if lengths else None,
        acceptance_rate=sum(p.accepted for p in ok) / drafted if drafted and in_chains else None,
        acceptance_at=_acceptance_at(ok) if in_chains else [],
        peak_bytes=max((p.peak_bytes for p in ok if p.peak_bytes is not None), default=None),
        added_bytes=max((p.added_bytes for p in ok if p.added_bytes is not None), default=None),
        memory_ratio=_memory_ratio(pairs, weight_bytes),
        equal=sum(p.tokens_equal is True for p in ok),
        compared=sum(p.tokens_equal is not None for p in ok),
        distinct_trigram_share=sum(shares) / len(shares) if shares else None,
        failed=len(prompts) - len(ok),
        left_out=len(prompts) - (sum(map(len, timed)) if baseline is None else sum(len(b) for b, _ in pairs)),
    )


def with_ratio(strategy: StrategyResult, eager: StrategyResult | None, seed: int) -> StrategyResult:
    """The strategy with its speed over that of its twin that is not compiled, if there is one."""
    pairs = _comparable(by_batch(strategy.prompts), by_batch(eager.prompts)) if eager is not None else []
    if eager is strategy or not pairs:
        return strategy
    return strategy.model_copy(update={"over_eager": median_ratio(*_speedup_columns(pairs), seed=seed)})


def rivals(strategies: Sequence[StrategyResult], seed: int) -> list[Rivals]:
    """Each strategy of ours over the peer that does the same with the same settings, where both decoded."""
    found = []
    for peer in (s for s in strategies if s.strategy in PEERS):
        same = PEERS[peer.strategy].ours, peer.settings, peer.sampled
        for ours in strategies:
            pairs = _comparable(by_batch(ours.prompts), by_batch(peer.prompts))
            if (ours.strategy, ours.settings, ours.sampled) == same and ours.lossless and pairs:
                ratio = median_ratio(*_speedup_columns(pairs), seed=seed)
                found.append(Rivals(ours=ours.name, peer=peer.name, sampled=peer.sampled, ratio=ratio))
    return found


def by_batch(prompts: Sequence[PromptResult]) -> list[Decoded]:
    """The prompts that did not fail, those of a batch together, in the order of the batches."""
    found: dict[int, list[PromptResult]] = {}
    for prompt in prompts:
        if prompt.status == "ok":
            assert prompt.batch is not None
            found.setdefault(prompt.batch, []).append(prompt)
    return [found[number] for number in sorted(found)]


Pair = tuple[Decoded, Decoded]


def _comparable(batches: Sequence[Decoded], baseline: Sequence[Decoded]) -> list[Pair]:
    """The batches that both decoded with the same prompts in them, with the baseline's twin of each."""
    twins = {_indices(batch): batch for batch in baseline if _has_speed(batch)}
    return [(b, twins[_indices(b)]) for b in batches if _has_speed(b) and _indices(b) in twins]


def _indices(batch: Decoded) -> frozenset[int]:
    return frozenset(prompt.index for prompt in batch)


def _has_speed(batch: Decoded) -> bool:
    return _tokens(batch) > 0 and batch[0].seconds > 0


def _tokens(batch: Decoded) -> int:
    return sum(prompt.new_tokens for prompt in batch)


def _speedup_columns(pairs: Sequence[Pair]) -> tuple[list[float], list[float], list[float], list[float]]:
    return (
        [_tokens(ours) for ours, _ in pairs],
        [ours[0].seconds for ours, _ in pairs],
        [_tokens(theirs) for _, theirs in pairs],
        [theirs[0].seconds for _, theirs in pairs],
    )


def _memory_ratio(pairs: Sequence[Pair], weight_bytes: int) -> float | None:
    both = [(ours[0].added_bytes, theirs[0].added_bytes) for ours, theirs in pairs]
    ratios = [
        (weight_bytes + ours) / (weight_bytes + theirs)
        for ours, theirs in both
        if ours is not None and theirs is not None and weight_bytes + theirs > 0
    ]
    return median(ratios) if ratios else None


def _acceptance_at(prompts: Sequence[PromptResult]) -> list[float | None]:
    depth = max((len(p.proposals_at) for p in prompts), default=0)
    proposals, accepted = [0] * depth, [0] * depth
    for prompt in prompts:
        for i, (proposed, kept) in enumerate(zip(prompt.proposals_at, prompt.accepted_at, strict=True)):
            proposals[i] += proposed
            accepted[i] += kept
    return [kept / proposed if proposed else None for kept, proposed in zip(accepted, proposals, strict=True)]
