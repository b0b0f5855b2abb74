"""Chi-square: do the texts that a strategy samples have the probabilities that the model's own forward gives them?

Short texts after one prompt, drawn tens of thousands of times. Every text that is expected often enough is a cell of
its own. The others are counted by the longest beginning that is expected often enough, so there are few cells
whatever the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.choosing import make_rule
from eval.correctness import Check, Strategy, make_strategies, progress, prompt_batches
from eval.decoding.speculate import Generation, decode
from eval.strategy_spec import BASELINE
from eval.target import Target
from layerskip_model.backbone import model_device
from layerskip_model.errors import UserError
from layerskip_model.jsonl import write_rows

TEMPERATURE = 0.8
LEAST_EXPECTED = 5.0  # draws in a cell, for Pearson's statistic to be distributed as chi-square
PROMPT_TOKENS = 8  # the last of a prompt; every draw runs them
LEFT_OUT = ("lookahead",)
"""By default: it runs the most rows for a draw, and has collected no n-grams yet where a text is so short."""
BUDGET = 2**30  # bytes that a batch of draws may take, about
MOST_ROWS = 2048  # of a batch
CHANCE = 1e-6
"""How probable it may be that a lossless strategy is called a bug, over all strategies of a run.

A false alarm costs days of search, so it must be rare over all runs of all users; and it may be, for a wrong strategy's
statistic grows with the draws: what has a p-value of 0.001 falls below this bound at about 1.5 times the draws.
"""

Text = tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """A chi-square statistic and its degrees of freedom. Those of independent draws add up."""

    statistic: float = 0.0
    freedom: int = 0

    def __add__(self, other: Fit) -> Fit:
        return Fit(self.statistic + other.statistic, self.freedom + other.freedom)

    @property
    def p_value(self) -> float:
        """How probable a statistic at least as large is where the probabilities are right."""
        if self.freedom == 0:
            return 1.0
        half = torch.tensor([self.freedom, self.statistic], dtype=torch.float64) / 2
        return float(torch.special.gammaincc(half[0], half[1]))


def pearson(observed: Tensor, expected: Tensor) -> Fit:
    """Pearson's test of counts against expected counts, [cells] each, both with the same sum.

    Cells where less than LEAST_EXPECTED is expected are taken together, and with the smallest other cell where
    that is still too little.
    """
    observed, expected = observed.double(), expected.double()
    large = expected >= LEAST_EXPECTED
    small = torch.stack([observed[~large].sum(), expected[~large].sum()])  # [2]
    cells = torch.stack([observed[large], expected[large]])  # [2, cells]
    if small[1] >= LEAST_EXPECTED:
        cells = torch.cat([cells, small[:, None]], dim=1)
    elif cells.shape[1]:
        cells[:, cells[1].argmin()] += small
    observed, expected = cells
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return Fit(statistic, max(len(expected) - 1, 0))


def check_distribution(
    target: Target, check: Check, draws: int = 20_000, tokens: int = 4, place: Path | None = None
) -> bool:
    """Test every strategy, the baseline too, and print what came of it; True where all follow. Raises UserError.

    `draws` texts of `tokens` tokens (fewer where a text ends) after each prompt's last PROMPT_TOKENS tokens; by
    default after one prompt, at temperature TEMPERATURE. `place`: a directory for distribution.jsonl.
    """
    # 1. Everything that can be refused is refused now.
    check = replace(
        check,
        sample=True,
        num_samples=check.num_samples or 1,
        choosing={"temperature": TEMPERATURE, **check.choosing},
    )
    for flag, value, least in (("draws", draws, 1000), ("tokens", tokens, 1)):
        if value < least:
            raise UserError(f"--{flag} {value}: give {least} or more")
    if not target.runner.takes_masks:
        raise UserError(
            f"--distribution: {target.model.config._attn_implementation} decodes one text at a time, which is too "
            "slow for this; give --attn_implementation sdpa"
        )
    strategies = make_strategies(target, check, left_out=LEFT_OUT)
    prompts = [
        one.tokens[-PROMPT_TOKENS:] for batch in prompt_batches(target, check) for one in batch.prompts
    ]

    # 2. What is right, by the model's own forward.
    right = [text_probabilities(target, check, prompt, tokens, draws) for prompt in prompts]
    if all(max(cells.values()) * draws > draws - LEAST_EXPECTED for cells in right):
        raise UserError(
            "--distribution: the model is sure of one text, which leaves nothing to test; raise --temperature, or "
            "name other prompts by --dataset"
        )

    # 3. What every strategy draws.
    bound = CHANCE / len(strategies)
    after = "a prompt" if len(prompts) == 1 else f"each of {len(prompts)} prompts"
    print(f"{draws} texts of {tokens} tokens after {after}; a p-value below {bound:.1g} is a bug", flush=True)
    rows = []
    for strategy in strategies:
        fit, drafted, accepted = Fit(), 0, 0
        for prompt, cells in zip(prompts, right, strict=True):
            generations = draw_texts(target, check, strategy, prompt, tokens, draws)
            fit += fitted(cells, [tuple(one.tokens) for one in generations])
            drafted += sum(one.drafted for one in generations)
            accepted += sum(one.accepted for one in generations)
        row = {
            "strategy": strategy.title,
            "draws": draws * len(prompts),
            "drafted": drafted,
            "accepted": accepted,
            "cells": fit.freedom + len(prompts),
            "statistic": fit.statistic,
            "freedom": fit.freedom,
            "p_value": fit.p_value,
            "verdict": "follows" if fit.p_value >= bound else "bug",
        }
        print(in_words(row), flush=True)
        rows.append(row)
    if place is not None:
        write_rows(place / "distribution.jsonl", rows)
        print(f"distribution: {place / 'distribution.jsonl'}")
    return all(row["verdict"] == "follows" for row in rows)


def text_probabilities(
    target: Target, check: Check, prompt: list[int], tokens: int, draws: int
) -> dict[Text, float]:
    """The probability of each cell: of a whole text, or of a beginning with anything that has no cell of its own.

    A beginning is taken further where LEAST_EXPECTED of `draws` texts or more are expected to have it.
    """
    ends = set(target.eos_token_ids)
    cells: dict[Text, float] = {}
    level: dict[Text, float] = {(): 1.0}
    for _ in range(tokens):
        longer: dict[Text, float] = {}
        unfinished = [text for text in level if not ends & set(text)]
        following = next_probabilities(target, check, prompt, unfinished)
        for text, probabilities in zip(unfinished, following, strict=True):
            joint = level.pop(text) * probabilities  # [vocab]
            likely = (joint * draws >= LEAST_EXPECTED).nonzero()[:, 0]
            longer |= {(*text, token): float(joint[token]) for token in likely.tolist()}
            cells[text] = float(joint.index_fill(0, likely, 0.0).sum())
        cells |= level  # texts that have ended
        level = longer
    return cells | level


@torch.inference_mode()
def next_probabilities(
    target: Target, check: Check, prompt: list[int], texts: list[Text]
) -> Iterator[Tensor]:
    """What may follow the prompt and each of some equally long texts: float64 [vocab], by the model's own forward."""
    shaping = make_rule(target, check.rule()).shaping
    assert shaping is not None
    width = len(prompt) + len(texts[0]) if texts else 1
    rows = max(1, BUDGET // (target.runner.vocab_size * 16 * width))
    for start in range(0, len(texts), rows):
        whole = [prompt + list(text) for text in texts[start : start + rows]]
        tokens = torch.tensor(whole, device=model_device(target.model))
        logits = target.model(input_ids=tokens, use_cache=False).logits[:, -1].double()  # [rows, vocab]
        yield from shaping.after_texts(whole, len(prompt), logits).softmax(dim=-1).cpu()


def draw_texts(
    target: Target, check: Check, strategy: Strategy, prompt: list[int], tokens: int, draws: int
) -> list[Generation]:
    """The prompt continued `draws` times, in batches, every row on a stream of its own."""
    size = rows_at_once(target, strategy, len(prompt) + tokens)
    generations = []
    for start in progress(range(0, draws, size), strategy.title):
        streams = range(start, min(start + size, draws))
        generations += decode(
            target.runner,
            strategy.make(),
            [prompt] * len(streams),
            max_new_tokens=tokens,
            eos_token_ids=target.eos_token_ids,
            rule=make_rule(target, check.rule()),
            streams=streams,
        )
    return generations


def rows_at_once(target: Target, strategy: Strategy, length: int) -> int:
    """Rows whose cache and whose distributions over the vocabulary fit the budget."""
    config, nodes = target.model.config.get_text_config(), strategy.drafter.max_nodes
    slot = 2 * target.runner.num_layers * config.hidden_size * target.runner.dtype.itemsize
    distributions = (
        nodes * target.runner.vocab_size * 40
    )  # logits, p and q, a sum in float64, what is on the way
    return max(1, min(MOST_ROWS, BUDGET // ((length + nodes) * slot + distributions)))


def fitted(cells: Mapping[Text, float], texts: Sequence[Text]) -> Fit:
    """The test of texts against the probabilities of cells."""
    counts = Counter(cell_of(text, cells) for text in texts)
    observed = torch.tensor([counts[cell] for cell in cells])
    return pearson(observed, torch.tensor(list(cells.values()), dtype=torch.float64) * len(texts))


def cell_of(text: Text, cells: Mapping[Text, float]) -> Text:
    """The longest beginning that is a cell; the empty one always is."""
    return next(text[:length] for length in range(len(text), -1, -1) if text[:length] in cells)


def in_words(row: Mapping[str, Any]) -> str:
    """What came of one strategy, in a line."""
    idle = "" if row["drafted"] or row["strategy"] == BASELINE else " (it drafted nothing here)"
    return (
        f"{row['strategy']}: chi-square {row['statistic']:.1f}, {row['freedom']} degrees of freedom, p = "
        f"{row['p_value']:.2g}, {row['accepted']} of {row['drafted']} drafts accepted{idle}: {row['verdict']}"
    )
