"""The speedup that self-speculation's acceptance and the measured cost of verifying promise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from eval.clock import now
from eval.decoding.acceptance import Greedy
from eval.decoding.drafters.base import State
from eval.results import PromptResult, StrategyResult
from eval.statistics import predicted_self_speculation_speedup
from eval.summary import by_batch
from eval.target import Target

VERIFY_COST_REPEATS = 25


def with_prediction(target: Target, summary: StrategyResult) -> StrategyResult:
    """The summary with its predicted speedup, for self-speculation by plain chains that has decoded anything."""
    is_plain = summary.settings.keys() == {"exit_layer", "num_speculations"}
    if summary.strategy != "self_speculative" or not is_plain or summary.acceptance_length is None:
        return summary
    exit_layer, drafts = summary.settings["exit_layer"], summary.settings["num_speculations"]
    assert isinstance(exit_layer, int)
    assert isinstance(drafts, int)
    batches = by_batch(summary.prompts)
    middles = [p.prompt_tokens + p.new_tokens / 2 for prompts in batches for p in prompts]
    length = int(statistics.median(middles))
    cost = verify_cost(target, exit_layer, drafts + 1, length, max(map(len, batches)))
    accepted = min(length_of_slowest(batches) - 1.0, drafts)
    predicted = predicted_self_speculation_speedup(
        accepted, drafts, exit_layer, target.runner.num_layers, cost
    )
    return summary.model_copy(update={"predicted_speedup": predicted, "verify_cost": cost})


def length_of_slowest(batches: Sequence[Sequence[PromptResult]]) -> float:
    """The acceptance length of those prompts that need the most forwards of their batch: it waits for them."""
    slowest = [max(prompts, key=lambda p: len(p.accepted_lengths)) for prompts in batches]
    return statistics.mean(length for prompt in slowest for length in prompt.accepted_lengths)


@torch.inference_mode()
def verify_cost(target: Target, exit_layer: int, rows: int, length: int, batch: int = 1) -> float:
    """v: the upper layers' time for `rows` rows after `length` cached tokens, over that for one row."""
    runner = target.runner
    length = max(1, min(length, runner.context_length - rows))
    state = State(runner, [[1] * length] * batch, length, rows, Greedy())
    hidden = runner.embed(torch.ones((batch, length), dtype=torch.long, device=runner.device))
    runner.run(hidden, 0, runner.num_layers, state.chain_context(0, length))
    state.cache.lengths = [length] * batch
    state.begin_step([1] * batch, [rows] * batch, [False] * batch)
    seconds: dict[int, list[float]] = {1: [], rows: []}
    for _ in range(VERIFY_COST_REPEATS):
        for count in seconds:
            hidden = runner.embed(torch.ones((batch, count), dtype=torch.long, device=runner.device))
            began = now(runner.device)
            runner.forward(hidden, exit_layer, runner.num_layers, state.chain_context(0, count), head=False)
            seconds[count].append(now(runner.device) - began)
    return statistics.median(seconds[rows]) / statistics.median(seconds[1])
