"""From a recipe's data section to files that training and evaluation read; made once, then reused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from layerskip_model.errors import UserError
from train.data.heldout import write_heldout
from train.data.packing import PackedTokens, tokenize
from train.data.sources import DataConfig, DocumentSet, split_documents
from train.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer

_LAYOUT = 1  # raise it when the same recipe gives other files


class Processes(Protocol):
    """What is asked of accelerate's PartialState (or Accelerator)."""

    @property
    def is_main_process(self) -> bool: ...

    def wait_for_everyone(self) -> None: ...


@dataclass(frozen=True)
class PreparedData:
    """The two streams of tokens, their tokenizer, and the file of held-out prompts (see `write_heldout`)."""

    train: PackedTokens
    heldout: PackedTokens
    tokenizer: PreTrainedTokenizerBase
    heldout_rows: Path


def prepare(
    config: DataConfig, tokenizer: TokenizerConfig, directory: Path, processes: Processes
) -> PreparedData:
    """Make train.bin, heldout.bin, heldout.jsonl and a trained tokenizer/ in `directory`, or reuse them.

    The main process does the work while the others wait; all of them must see `directory`. Files are reused
    when nothing changed that they depend on: the configuration, the tokenizer, each document's name and text.
    A new tokenizer is trained on the training documents alone.
    Raises UserError for unusable sources or tokenizers; on the other processes too.
    """
    try:
        if processes.is_main_process:
            _make_files(config, tokenizer, directory)
    finally:
        processes.wait_for_everyone()
    if not _finished_path(directory).exists():
        raise UserError(
            f"{directory}: no prepared data; see the main process's error, or use a shared folder"
        )
    return PreparedData(
        train=PackedTokens.open(directory / "train.bin"),
        heldout=PackedTokens.open(directory / "heldout.bin"),
        tokenizer=load_tokenizer(tokenizer.name_or_path or str(directory / "tokenizer")),
        heldout_rows=directory / "heldout.jsonl",
    )


def _finished_path(directory: Path) -> Path:
    """The file that says what the others were made from. It is written last and goes first."""
    return directory / "prepared.json"


def _make_files(config: DataConfig, tokenizer_config: TokenizerConfig, directory: Path) -> None:
    training, heldout = split_documents(config)
    pretrained = load_tokenizer(tokenizer_config.name_or_path) if tokenizer_config.name_or_path else None
    settings = f"{_LAYOUT} {config.model_dump_json()} {tokenizer_config.model_dump_json()}"
    digest = hashlib.sha256(settings.encode())
    if pretrained is not None:
        digest.update(_tokenizer_text(pretrained).encode())
    num_training = _digest_documents(training, digest.update)
    num_heldout = _digest_documents(heldout, digest.update)
    if _is_finished(directory, digest.hexdigest()):
        return

    finished = _finished_path(directory)
    finished.unlink(missing_ok=True)
    if pretrained is None:
        assert tokenizer_config.train is not None
        texts = (document.text for document in training)
        pretrained = train_tokenizer(texts, tokenizer_config.train.vocab_size)
        pretrained.save_pretrained(directory / "tokenizer")
    tokenize(training, pretrained, directory / "train.bin", num_training)
    tokenize(heldout, pretrained, directory / "heldout.bin", num_heldout)
    write_heldout(heldout, directory / "heldout.jsonl")
    made = {"fingerprint": digest.hexdigest(), "trained_tokenizer": tokenizer_config.train is not None}
    temporary = finished.with_suffix(".tmp")
    temporary.write_text(json.dumps(made))
    os.replace(temporary, finished)


def _is_finished(directory: Path, fingerprint: str) -> bool:
    """Whether the files are there and were made from what `fingerprint` stands for."""
    try:
        made = json.loads(_finished_path(directory).read_text())
        for name in ("train.bin", "heldout.bin"):
            PackedTokens.open(directory / name)
    except (OSError, ValueError):
        return False
    others = ["heldout.jsonl"] + ["tokenizer/tokenizer.json"] * made["trained_tokenizer"]
    return made["fingerprint"] == fingerprint and all((directory / name).exists() for name in others)


def _digest_documents(documents: DocumentSet, update: Callable[[bytes], None]) -> int:
    number = 0
    for document in documents:
        text = document.text.encode()
        update(f"{document.name}\n{len(text)}\n".encode())
        update(text)
        number += 1
    update(f"{number} documents".encode())
    return number


def _tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that decides how this tokenizer encodes a document."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return f"{type(tokenizer).__name__} {tokenizer.eos_token_id} {rules}"
