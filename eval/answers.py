"""Tasks with one right answer: how often each exit gives it, and whether speculation changes an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.prompts import encode_prompts
from eval.results import Answers
from eval.streaming import TextStream
from eval.target import Target
from layerskip_model.errors import UserError
from layerskip_model.jsonl import PromptRow

BATCH = 16  # prompts decoded together


@dataclass(frozen=True)
class Question:
    """A prompt's token ids and its right answer."""

    tokens: list[int]
    answer: str


def questions(target: Target, rows: Sequence[PromptRow]) -> list[Question]:
    """The rows' prompts with their responses. Raises UserError for a row that has none."""
    answers = [(row.response or "").strip() for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        if not answer:
            raise UserError(f"{row.source}:{row.line}: has no response, the right answer; give every row one")
    tokens = [prompt.tokens for prompt in encode_prompts(target, rows)]
    return [Question(*pair) for pair in zip(tokens, answers, strict=True)]


def measure_answers(
    target: Target, asked: Sequence[Question], exits: Sequence[int], speculation: dict[str, Any] | None
) -> list[Answers]:
    """Exact match, greedily, of the exits and of the last layer; white space around an answer does not count.

    With `speculation`, settings of self_speculative, its answers too. Each way's answers are compared with the last
    layer's, token id by token id. An answer may be a little longer than the longest right one, and no more:
    it is wrong then anyway. Raises UserError for an exit or a setting that the model does not have.
    """
    ways: list[tuple[str, dict[str, Any]]] = [("autoregressive", {"exit_layer": target.runner.num_layers})]
    ways += [("autoregressive", {"exit_layer": e}) for e in exits if e != target.runner.num_layers]
    ways += [("self_speculative", speculation)] if speculation else []
    for name, settings in ways:  # a mistake in the last one costs no decode
        make_drafter(name, target.runner, **settings)
    longest = max(len(target.tokenizer(one.answer)["input_ids"]) for one in asked) + 8
    found: list[Answers] = []
    reference: list[list[int]] = []
    for name, settings in track(ways, "answering", console=Console(stderr=True), transient=True):
        given = _decode(target, asked, name, settings, longest)
        reference = reference or given
        texts = [_text(target, question, tokens) for question, tokens in zip(asked, given, strict=True)]
        right = sum(text == one.answer for text, one in zip(texts, asked, strict=True))
        equal = sum(ours == theirs for ours, theirs in zip(given, reference, strict=True))
        found.append(Answers(strategy=name, settings=settings, right=right, equal=equal, asked=len(asked)))
    return found


def _decode(
    target: Target, asked: Sequence[Question], name: str, settings: dict[str, Any], limit: int
) -> list[list[int]]:
    """The new tokens of every question, in batches as large as the model's attention takes."""
    size = BATCH if target.runner.takes_masks else 1
    return [
        generation.tokens
        for start in range(0, len(asked), size)
        for generation in decode(
            target.runner,
            make_drafter(name, target.runner, **settings),
            [question.tokens for question in asked[start : start + size]],
            max_new_tokens=limit,
            eos_token_ids=target.eos_token_ids,
        )
    ]


def _text(target: Target, question: Question, tokens: list[int]) -> str:
    stream = TextStream(target.tokenizer, question.tokens)
    return (stream.push(tokens) + stream.finish()).strip()
