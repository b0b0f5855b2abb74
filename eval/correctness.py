"""The check of losslessness on a user's own model: token ids of every strategy against plain decoding's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from eval.choosing import Choosing, make_rule
from eval.contestants import shown_settings
from eval.decoding.drafters.base import Drafter
from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.differences import Examiner
from eval.draft_heads import drafting_strategy
from eval.drafts import with_loaded_drafts
from eval.prompts import HELDOUT, Batch, Prompt, dataset_path, encode_prompts, evenly_spaced, make_batches
from eval.results import Difference
from eval.strategy_spec import (
    BASELINE,
    EXITS,
    PEERS,
    SAME_HEADS,
    Spec,
    check_given,
    parse_spec,
    settings_for,
    suggested,
)
from eval.target import Target
from eval.titles import setting_words
from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_prompts, write_rows

VARIANTS = ("draft_stop", "stop_threshold", "draft_tree", "tree_top_k", "tree_tokens")
"""Settings that make a variant of self-speculation; where one is given only that variant is checked by default."""


Item = TypeVar("Item")


@dataclass(frozen=True)
class Check:
    """What to check.

    Attributes:
        strategies: entries of `eval.strategy_spec`; None for all that the model and the settings allow.
        settings: for the strategies that take them.
        dataset: a JSONL file, or "heldout" for the held-out rows of the run that made the model.
        num_samples: prompts; default: 32, or all of a file that has fewer.
        max_steps: new tokens a prompt.
        batch_size: prompts decoded together.
        sample: draw tokens; else always the most likely one.
        choosing: further fields of `eval.choosing.Choosing`, by name.

    Raises UserError for what is wrong on any model.
    """

    strategies: Sequence[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    dataset: str | Path = HELDOUT
    num_samples: int | None = None
    max_steps: int = 128
    batch_size: int = 1
    sample: bool = False
    choosing: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.choosing.get("acceptance") == "typical":
            raise UserError("--acceptance typical is not lossless, and is not meant to be; leave it out here")
        self.rule()
        for flag in ("num_samples", "max_steps", "batch_size"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise UserError(f"--{flag} {value}: give 1 or more")
        if self.strategies is not None:
            self.specs(self.strategies)

    def rule(self) -> Choosing:
        """How tokens are chosen. Raises UserError."""
        return Choosing(self.sample, **self.choosing)

    def specs(self, entries: Sequence[str]) -> list[Spec]:
        """The strategies to check beside the baseline. Raises UserError."""
        found = {str(spec): spec for spec in map(parse_spec, entries) if spec.name != BASELINE}
        specs = list(found.values())
        for spec in specs:
            if spec.name in PEERS:
                raise UserError(f"--strategies '{spec}': is transformers' own; only ours are checked here")
        if not specs:
            raise UserError(f"--strategies: has nothing to compare with {BASELINE}; name another one")
        check_given(specs, self.settings)
        return specs


@dataclass(frozen=True)
class Strategy:
    """A strategy to check, with all its settings."""

    title: str
    make: Callable[[], Drafter]
    drafter: Drafter  # one that was made, to be asked


def make_strategies(target: Target, check: Check, left_out: Sequence[str] = ()) -> list[Strategy]:
    """The strategies that a check is about, the baseline first. Raises UserError.

    `left_out`: entries that are not among those checked by default.
    """
    if check.batch_size > 1 and not target.runner.takes_masks:
        raise UserError(
            f"--batch_size {check.batch_size}: {target.model.config._attn_implementation} decodes one text at a "
            "time; give --attn_implementation sdpa"
        )
    entries = check.strategies
    if entries is None:
        entries = [one for one in default_entries(target, check.settings) if one not in left_out]
    return [make_strategy(target, spec, check.settings) for spec in [Spec(BASELINE), *check.specs(entries)]]


def make_strategy(target: Target, spec: Spec, given: dict[str, Any]) -> Strategy:
    """The strategy of an entry, with those of the settings given for all that it takes. Raises UserError."""
    settings = with_loaded_drafts(target, spec.name, settings_for(spec, target, given))

    def make() -> Drafter:
        return make_drafter(spec.name, target.runner, **settings)

    drafter = make()
    words = setting_words(shown_settings(vars(drafter.settings)))
    return Strategy(", ".join([spec.name, *words]), make, drafter)


def default_entries(target: Target, settings: dict[str, Any]) -> list[str]:
    """All that the model and the settings allow: what needs a draft model or an exit layer only with one."""
    entries = []
    if {"exit_layer", "num_speculations"} <= {*suggested(target, EXITS, settings), *settings}:
        entries.append(EXITS)
        if not any(name in settings for name in VARIANTS):
            entries += [f"{EXITS}:draft_stop=confidence", f"{EXITS}:draft_tree"]
    drafting = None
    if "draft" in settings:
        drafting = drafting_strategy(settings["draft"])
    elif target.run is not None and target.run.heads is not None:
        drafting = target.run.strategy
    if drafting is not None:
        entries += [drafting, *SAME_HEADS.get(drafting, ())]
    entries += ["prompt_lookup", "lookahead"]
    masked = ("draft_tree", "lookahead", "medusa", "hydra", "eagle", "eagle2", "eagle3")
    return [one for one in entries if target.runner.takes_masks or not one.endswith(masked)]


def check_tokens(target: Target, check: Check, place: Path | None = None) -> bool:
    """Compare, and print what came of it; True where there is no bug. Raises UserError.

    The reference is plain decoding of one prompt at a time, and is compared itself with what the model's own forward
    says in place of each of its tokens. `place`: a directory for differences.jsonl.
    """
    # 1. Everything that can be refused is refused now.
    baseline, *others = make_strategies(target, check)
    batches = prompt_batches(target, check)
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    examiner = Examiner(target, check.rule())

    # 2. The reference, and whether it is what the model says.
    reference = decode_all(target, check, baseline, [Batch(one.index, [one]) for one in prompts])
    own = {one.index: examiner.own_choices(one.tokens, reference[one.index], one.index) for one in prompts}
    rows = compare(examiner, f"{baseline.title}, by the model's own forward", prompts, own, reference)

    # 3. Every strategy beside it.
    for strategy in others:
        if check.sample and strategy.drafter.draws:
            print(
                f"{strategy.title}: draws its drafts, so other tokens may be right; --distribution checks it"
            )
            continue
        tokens = decode_all(target, check, strategy, batches)
        rows += compare(examiner, strategy.title, prompts, reference, tokens)
    if place is not None:
        write_rows(place / "differences.jsonl", rows)
        print(f"differences: {place / 'differences.jsonl'}")
    return all(row["verdict"] != "bug" for row in rows)


def prompt_batches(target: Target, check: Check) -> list[Batch]:
    """The prompts in batches; those that do not fit the model's context are named and left out. Raises UserError."""
    chosen = evenly_spaced(read_prompts(dataset_path(target, check.dataset)), check.num_samples)
    batches, unfit = make_batches(target, encode_prompts(target, chosen), check.batch_size)
    for error in unfit.values():
        print(f"left out: {error}", file=sys.stderr)
    if not batches:
        raise UserError(f"--dataset {check.dataset}: no prompt fits the model's context; give shorter ones")
    return batches


def decode_all(
    target: Target, check: Check, strategy: Strategy, batches: list[Batch]
) -> dict[int, list[int]]:
    """The new tokens of every prompt, by its index."""
    tokens = {}
    for batch in progress(batches, strategy.title):
        generations = decode(
            target.runner,
            strategy.make(),
            batch.tokens,
            max_new_tokens=check.max_steps,
            eos_token_ids=target.eos_token_ids,
            rule=make_rule(target, check.rule()),
            streams=batch.streams,
        )
        for prompt, generation in zip(batch.prompts, generations, strict=True):
            tokens[prompt.index] = generation.tokens
    return tokens


def progress(items: Sequence[Item], title: str) -> Iterable[Item]:
    """The items, with a bar on a terminal while they last."""
    console = Console(stderr=True)
    return track(items, title, console=console, transient=True, disable=not console.is_terminal)


def compare(
    examiner: Examiner,
    title: str,
    prompts: Sequence[Prompt],
    expected: dict[int, list[int]],
    got: dict[int, list[int]],
) -> list[dict[str, Any]]:
    """Print how many prompts are equal, and how each of the others differs; those as rows of a file."""
    rows = []
    for prompt in prompts:
        ours = got[prompt.index]
        difference = examiner.compare(prompt.tokens, expected[prompt.index], ours, prompt.index)
        if difference is not None:
            rows.append({"strategy": title, **difference_row(examiner.target, prompt, difference)})
    ties, bugs = (sum(row["verdict"] == verdict for row in rows) for verdict in ("tie", "bug"))
    counts = [f"{len(prompts) - len(rows)} of {len(prompts)} prompts equal"]
    counts += [counted(ties, "tie")] if ties else []
    counts += [counted(bugs, "bug")] if bugs else []
    print(f"{title}: {', '.join(counts)}")
    for row in rows:
        print(f"  {difference_words(row)}")
    return rows


def difference_row(target: Target, prompt: Prompt, difference: Difference) -> dict[str, Any]:
    """A difference with where it is and what its tokens look like."""
    texts = {
        f"{name}_text": None if token is None else str(target.tokenizer.decode([token]))
        for name, token in (("expected", difference.expected), ("got", difference.got))
    }
    return {"prompt": prompt.index, "source": prompt.source, **difference.model_dump(), **texts}


def difference_words(row: dict[str, Any]) -> str:
    """The same in a line."""
    tokens = [
        "the end" if row[name] is None else f"{row[f'{name}_text']!r} ({row[name]})"
        for name in ("expected", "got")
    ]
    gap = "" if row["gap"] is None else f", gap {row['gap']:.2g}"
    place = f"prompt {row['prompt']} ({row['source']}), token {row['position']}"
    return f"{place}: {tokens[1]} in place of {tokens[0]}{gap}: {row['verdict']}"


def counted(count: int, noun: str) -> str:
    """1 bug, 2 bugs."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
