"""The quality of every exit on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.results import ExitQuality
from eval.target import Target
from layerskip_model.backbone import model_device
from layerskip_model.early_exit import EarlyExitModel, ExitLoss, LossTerms
from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import begin_of_text
from layerskip_model.jsonl import read_rows
from layerskip_model.token_loss import IGNORE_INDEX

SHORT = 20  # batches; more have a progress bar


@dataclass(frozen=True)
class Answer:
    """A response that is measured after the prompt that it answers; `special_tokens` as in PromptRow."""

    prompt: str
    response: str
    special_tokens: bool


@torch.no_grad()
def measure_exits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Answer],
    length: int,
    batch: int = 8,
) -> list[ExitQuality]:
    """Cross entropy, bits per byte, top-1 accuracy and agreement with the last layer, exit by exit.

    Every text begins after the token that begins texts in training and is read in windows of `length` tokens, each
    token predicted once; of answers those of the response. Bits per byte are over the UTF-8 bytes of what is predicted.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    measured = EarlyExitModel(model, last_exit_only(num_layers), None).eval()
    try:
        windows = list(_windows(tokenizer, texts, length))
        if not windows:
            raise UserError("the held-out text has no tokens; give a file with some text")
        device = model_device(model)
        totals: dict[int, list[float]] = {e: [0.0, 0.0, 0.0] for e in range(1, num_layers + 1)}
        tokens = 0
        batches = [windows[i : i + batch] for i in range(0, len(windows), batch)]
        console, short = Console(stderr=True), len(batches) < SHORT
        for rows in track(batches, "measuring exits", console=console, transient=True, disable=short):
            inputs, labels = (torch.tensor(part, device=device) for part in zip(*rows, strict=True))
            terms = measured(inputs, labels, list(range(len(rows))), 0)
            tokens += _add(totals, terms)
    finally:
        measured.backbone.release_layers()
    predicted = (text if isinstance(text, str) else text.response for text in texts)
    num_bytes = sum(len(text.encode()) for text in predicted)
    return [
        ExitQuality(
            layer=exit_layer,
            cross_entropy=nats / tokens,
            bits_per_byte=nats / math.log(2.0) / num_bytes,
            top1=correct / tokens,
            agreement=agreeing / tokens,
            tokens=tokens,
        )
        for exit_layer, (nats, correct, agreeing) in totals.items()
    ]


def window_length(target: Target, wanted: int | None) -> int:
    """Tokens a window: as wanted, else the training length, else the model's context. Raises UserError."""
    limit = target.runner.context_length
    length = wanted if wanted is not None else target.run.length if target.run is not None else limit
    if not 1 <= length <= limit:
        raise UserError(f"--context_length {length}: the model's context allows 1 to {limit}")
    return length


def last_exit_only(num_layers: int) -> ExitLoss:
    """Plain training: the last layer alone has a loss."""
    return ExitLoss(num_layers, 1, exits=[], weights="uniform", e_scale=1.0, curriculum="none", every=1)


def heldout_texts(path: Path) -> list[str | Answer]:
    """Whole documents from rows of `prompt`, `response` and `document`; rows of one document follow each other.

    Rows with `text`, or without `document`, are documents of their own; rows that say something about
    `special_tokens` are answers to prompts. Raises UserError for a file with no text.
    """
    rows = [(number, row) for number, row in read_rows(path)]
    texts: list[str | Answer] = []
    for _, group in groupby(rows, key=_document):
        members = [row for _, row in group]
        if "special_tokens" in members[0]:
            texts += [_answer(row) for row in members if row.get("response")]
        elif text := "".join(map(_text, members)):
            texts.append(text)
    if not texts:
        raise UserError(f"{path}: has no rows with text, or with prompt and response")
    return texts


def _document(item: tuple[int, dict[str, object]]) -> object:
    """What the rows of one document have in common, and no other row."""
    number, row = item
    return number if "special_tokens" in row or "document" not in row else (row["document"],)


def _answer(row: dict[str, object]) -> Answer:
    return Answer(_text(row, "prompt"), _text(row, "response"), row["special_tokens"] is not False)


def _text(row: dict[str, object], *names: str) -> str:
    parts = [row.get(name) for name in names or ("text", "prompt", "response")]
    return "".join(part for part in parts if isinstance(part, str))


def _windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Answer], length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs and labels of `length` tokens, the last of a text filled up with labels that don't count."""
    begin = begin_of_text(tokenizer)
    for given, ids in _streams(tokenizer, texts, begin):
        stream, targets = given + ids, [IGNORE_INDEX] * len(given) + ids
        for start in range(0, len(stream) - 1, length):
            labels = targets[start + 1 : start + length + 1]
            inputs = stream[start : start + len(labels)]
            missing = length - len(labels)
            if any(label != IGNORE_INDEX for label in labels):
                yield inputs + [begin] * missing, labels + [IGNORE_INDEX] * missing


def _streams(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Answer], begin: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids that are given and those after them that are predicted, of each text."""
    for text in texts:
        if isinstance(text, str):
            yield [begin], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            given = tokenizer(text.prompt, add_special_tokens=text.special_tokens, verbose=False)["input_ids"]
            yield given, tokenizer(text.response, add_special_tokens=False, verbose=False)["input_ids"]


def _add(totals: dict[int, list[float]], terms: LossTerms) -> int:
    for exit_layer, nats in terms.cross_entropy.items():
        total = totals[exit_layer]
        total[0] += float(nats)
        total[1] += float(terms.correct[exit_layer])
        total[2] += float(terms.agreement[exit_layer])
    assert terms.tokens is not None
    return int(terms.tokens)
