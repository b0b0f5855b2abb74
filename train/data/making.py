"""Makes what a recipe's data section asks for and is not there yet. One process does it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerskip_model.chat import ChatTemplate
from layerskip_model.errors import UserError
from train.data.cache import Cache
from train.data.encoding import encoder_for
from train.data.examples import Tolerance
from train.data.fingerprints import FileHashes
from train.data.heldout import write_heldout
from train.data.row_forms import RowForm
from train.data.sources import DataConfig, DocumentSet, Source, heldout_limit, split_documents
from train.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer
from train.data.tokens import tokenize

_LAYOUT = 2  # raise it when the same recipe gives other files


def manifest_path(directory: Path) -> Path:
    """The file in a run's data directory that says which folders it reads."""
    return directory / "prepared.json"


def make_files(config: DataConfig, tokenizer_config: TokenizerConfig, directory: Path) -> None:
    """A tokenizer, each source's token files and the held-out prompts, in folders that the manifest names.

    They are in data.cache_dir, or else in `directory`, from which folders of other settings are deleted.
    Streams get no files. Raises UserError for unusable sources or tokenizers.
    """
    cache = Cache(Path(config.cache_dir).expanduser() if config.cache_dir else directory)
    cache.create()
    training, heldout = _parts(config, cache)
    tokenizer_path = _make_tokenizer(tokenizer_config, training, cache)
    tokenizer = load_tokenizer(tokenizer_path)
    stored = [source for source in training.sources if not source.streaming]
    made = {
        "tokenizer": tokenizer_path,
        "train": [str(_make_tokens(training, source, tokenizer, cache)) for source in stored],
        "heldout": [str(_make_tokens(heldout, source, tokenizer, cache)) for source in heldout.sources],
        "prompts": str(_make_prompts(heldout, tokenizer, cache)),
    }
    if not config.cache_dir:
        cache.delete_unused()
    directory.mkdir(parents=True, exist_ok=True)
    temporary = manifest_path(directory).with_suffix(".tmp")
    temporary.write_text(json.dumps(made, indent=1))
    os.replace(temporary, manifest_path(directory))


@dataclass(frozen=True)
class Part:
    """The training or the held-out documents, and what decides which these are."""

    name: str
    documents: DocumentSet
    limit: float | None
    fingerprints: dict[int, str]  # of the sources, by id(): what changes with their rows
    config: DataConfig

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of the documents."""
        return self.documents.sources

    def made_from(self, source: Source) -> list[Any]:
        """What decides one source's documents of this part."""
        return [_LAYOUT, self.name, self.limit, self.config.skip_malformed, self.fingerprints[id(source)]]


def _parts(config: DataConfig, cache: Cache) -> tuple[Part, Part]:
    hashes = FileHashes(cache.root / "hashes.json")
    stored = [source for source in config.train if not source.streaming] + config.heldout_sources
    fingerprints = {id(source): source.fingerprint(hashes) for source in stored}
    hashes.save()
    tolerance = Tolerance(config.skip_malformed)

    def write_limit(folder: Path) -> None:
        (folder / "split.json").write_text(json.dumps({"limit": heldout_limit(config, tolerance)}))

    limit = None
    if not config.heldout_sources:
        made_from = [_LAYOUT, config.heldout, config.skip_malformed, *fingerprints.values()]
        limit = json.loads((cache.folder("split", made_from, write_limit) / "split.json").read_text())[
            "limit"
        ]
    training, heldout = split_documents(config, limit, tolerance)
    return (
        Part("train", training, limit, fingerprints, config),
        Part("heldout", heldout, limit, fingerprints, config),
    )


def _make_tokenizer(config: TokenizerConfig, training: Part, cache: Cache) -> str:
    """A name or path to load the tokenizer from."""
    if config.name_or_path is not None:
        return config.name_or_path
    assert config.train is not None
    vocab_size = config.train.vocab_size
    if any(source.streaming for source in training.sources):
        raise UserError(
            "model.tokenizer.train reads every training document, and data.train has a stream; "
            "give model.tokenizer.name_or_path, or streaming: false"
        )

    def make(folder: Path) -> None:
        texts = (document.text for document in training.documents)
        train_tokenizer(texts, vocab_size).save_pretrained(folder)

    made_from = [vocab_size, [training.made_from(source) for source in training.sources]]
    return str(cache.folder("tokenizer", made_from, make))


def _make_tokens(part: Part, source: Source, tokenizer: PreTrainedTokenizerBase, cache: Cache) -> Path:
    encode = encoder_for(source, tokenizer, part.config, part.documents.tolerance)

    def make(folder: Path) -> None:
        tokenize(
            encode(part.documents.of(source)),
            folder,
            largest_id=max(tokenizer.get_vocab().values()),
            end=int(tokenizer.eos_token_id),
            whole=source.whole,
            label=f"{part.name} {source.label}",
        )

    made_from = [part.made_from(source), encode.rules, tokenizer_digest(tokenizer)]
    return cache.folder(part.name, made_from, make)


def _make_prompts(heldout: Part, tokenizer: PreTrainedTokenizerBase, cache: Cache) -> Path:
    talks = any(isinstance(source, RowForm) and source.conversation for source in heldout.sources)
    chat = ChatTemplate.load(tokenizer, heldout.config.chat_template) if talks else None

    def make(folder: Path) -> None:
        write_heldout(heldout.documents, folder / "heldout.jsonl", chat=chat)

    written_by = [chat.source, tokenizer_digest(tokenizer)] if chat else []
    return cache.folder("prompts", [*map(heldout.made_from, heldout.sources), *written_by], make)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What changes with everything that decides how this tokenizer encodes a document."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    text = f"{type(tokenizer).__name__} {tokenizer.bos_token_id} {tokenizer.eos_token_id} {rules}"
    return hashlib.sha256(text.encode()).hexdigest()
