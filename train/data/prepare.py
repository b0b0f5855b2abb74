"""From a recipe's data section to rows that training and evaluation read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from layerskip_model.errors import UserError
from train.data.batches import Batches, StepBatches
from train.data.encoding import encoder_for
from train.data.examples import Tolerance
from train.data.making import make_files, manifest_path
from train.data.mixing import EpochOrder, RowOrder, WeightedOrder
from train.data.packing import ExampleRows, JoinedRows, Rows, WindowRows
from train.data.sources import DataConfig, Source
from train.data.stream_rows import RowShape, SourceRows, StreamState
from train.data.streaming import Mixer, RowSource, StoredRows, StreamBatches, StreamedRows, part_of_state
from train.data.tokenizer import TokenizerConfig, load_tokenizer
from train.data.tokens import PackedTokens
from train.processes import on_main_process

SourceOfRows = WindowRows | ExampleRows


@dataclass(frozen=True)
class PreparedData:
    """Rows to train on and to measure on, their tokenizer, and held-out prompts (see `write_heldout`).

    `training` has the rows on disk, and none where a source is a stream (`is_streamed`).
    """

    config: DataConfig
    length: int
    training: JoinedRows
    heldout: JoinedRows
    tokenizer: PreTrainedTokenizerBase
    heldout_prompts: Path
    stored: dict[int, SourceOfRows]  # by the number of the training source
    notes: list[str]  # what the user should know of the data

    @property
    def is_streamed(self) -> bool:
        """Whether some rows come while training, so that nobody knows how many there are."""
        return len(self.stored) < len(self.config.train)

    @property
    def amount(self) -> str:
        """How much there is to train on, in words."""
        tokens = sum(len(rows.ids) for rows in self.stored.values())
        return "a stream of tokens" if self.is_streamed else f"{tokens:,} tokens"

    def batches(
        self,
        rows: Rows,
        *,
        sequences: int,
        micro: int,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
        state: StreamState | None = None,
        is_stopping: Callable[[], bool] = bool,
    ) -> Batches:
        """One rank's micro-batches of steps start..stop-1: `rows` are `training` or what a method made of them.

        `state` is what `Batches.state` gave after step start - 1; `is_stopping` whether not to wait for a source that
        is away. Raises UserError for a method that makes rows
        of its own, where they are streamed.
        """
        if not self.is_streamed:
            return StepBatches(rows, self._order(seed), sequences, micro, start, stop, rank, world)
        if rows is not self.training:
            raise UserError(
                "data.train: a source has streaming: true, and this objective works on rows at hand; "
                "set streaming: false"
            )
        assert start == 0 or rank > 0 or state is not None, "a stream goes on from a state"
        return StreamBatches(
            lambda: self._mixer(seed, state), sequences, micro, start, stop, rank, world, state, is_stopping
        )

    def rows_of_steps(self, steps: int, sequences: int, seed: int) -> list[int]:
        """The numbers of the rows that so many steps train on, each once and in order, where no source is a stream."""
        order, read = self._order(seed), np.zeros(len(self.training), dtype=bool)
        for step in range(steps):
            read[order(np.arange(step * sequences, (step + 1) * sequences))] = True
        return np.flatnonzero(read).tolist()

    def _weights(self) -> list[float] | None:
        weights = [source.weight for source in self.config.train if source.weight is not None]
        return weights or None

    def _order(self, seed: int) -> RowOrder:
        weights = self._weights()
        if weights is None:
            return EpochOrder(len(self.training), seed)
        return WeightedOrder([len(rows) for rows in self.stored.values()], weights, seed)

    def _mixer(self, seed: int, state: StreamState | None) -> Mixer:
        """All training sources as streams of rows, from a state on. For the main process."""
        passed = json.loads(str(state["passed"])) if state else []
        tolerance = Tolerance(self.config.skip_malformed, passed)
        sources: list[RowSource] = []
        for number, source in enumerate(self.config.train):
            if number in self.stored:
                rows = self.stored[number]
                sources.append(StoredRows(rows, EpochOrder(len(rows), seed, number)))
            else:
                part = part_of_state(state, number)
                sources.append(StreamedRows(self._stream(number, source, seed, tolerance, part)))
        place = int(state["rows"]) if state else 0
        return Mixer(sources, self._weights() or [1.0], seed, place, tolerance)

    def _stream(
        self, number: int, source: Source, seed: int, tolerance: Tolerance, state: StreamState | None
    ) -> SourceRows:
        tokenizer = copy.deepcopy(self.tokenizer)  # a tokenizer must not be used by two threads
        assert tokenizer.eos_token_id is not None, "load_tokenizer refuses such a tokenizer"
        return SourceRows(
            f"data.train[{number}]",
            source,
            encoder_for(source, tokenizer, self.config, tolerance),
            RowShape(self.length, self.config.documents == "separate", tokenizer.eos_token_id),
            buffer=self.config.shuffle_buffer,
            seed=(seed, number),
            tolerance=tolerance,
            state=state,
        )


def prepare(
    config: DataConfig, tokenizer: TokenizerConfig, directory: Path, state: PartialState, *, length: int
) -> PreparedData:
    """Make token files, held-out prompts and a trained tokenizer, or reuse them; rows of `length` tokens.

    The main process does the work while the others wait; all of them must see `directory`, or data.cache_dir.
    Each is kept under the name of what it depends on (the sources' content, the tokenizer, the settings that
    matter for it), so nothing is made twice, nor read again. A new tokenizer is trained on the training
    documents alone. Raises UserError on every process for unusable sources or tokenizers.
    """
    on_main_process(state, lambda: make_files(config, tokenizer, directory))
    try:
        made = json.loads(manifest_path(directory).read_text())
        parts = {
            name: [PackedTokens.open(Path(path)) for path in made[name]] for name in ("train", "heldout")
        }
    except (OSError, ValueError):
        raise UserError(
            f"{directory}: no prepared data; see the main process's error, or use a shared folder"
        ) from None
    separate = config.documents == "separate"
    training = [_rows(packed, length, separate) for packed in parts["train"]]
    heldout = [_rows(packed, length, separate, keep_last=True) for packed in parts["heldout"]]
    numbers = [number for number, source in enumerate(config.train) if not source.streaming]
    weights = [config.train[number].weight for number in numbers]
    _refuse_too_little(
        "train", numbers, parts["train"], training, wanted=[bool(weight) for weight in weights]
    )
    _refuse_too_little("heldout", list(range(len(heldout))), parts["heldout"], heldout)
    pretrained = load_tokenizer(made["tokenizer"])
    if config.chat_template is not None:  # the export has to write conversations as training did
        pretrained.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    return PreparedData(
        config=config,
        length=length,
        training=JoinedRows(training),
        heldout=JoinedRows(heldout),
        tokenizer=pretrained,
        heldout_prompts=Path(made["prompts"]) / "heldout.jsonl",
        stored=dict(zip(numbers, training, strict=True)),
        notes=_notes("train", numbers, training) + _notes("heldout", list(range(len(heldout))), heldout),
    )


def _rows(packed: PackedTokens, length: int, separate: bool, *, keep_last: bool = False) -> SourceOfRows:
    if packed.whole:
        return ExampleRows(packed, length, separate=separate)
    return WindowRows(packed, length, separate=separate, keep_last=keep_last)


def _refuse_too_little(
    part: str,
    numbers: list[int],
    tokens: list[PackedTokens],
    rows: list[SourceOfRows],
    wanted: list[bool] | None = None,
) -> None:
    """Raise UserError where a source that is `wanted` by its weight has no row, or none of all has one."""
    nothing = not any(len(its_rows) for its_rows in rows)
    for index, (number, packed, its_rows) in enumerate(zip(numbers, tokens, rows, strict=True)):
        name = f"data.{part}" if part == "heldout" else f"data.{part}[{number}]"
        if packed.short and not packed.documents:
            raise UserError(
                f"{name}: all {packed.short} documents are shorter than two tokens, so there is nothing to "
                "predict; give longer ones"
            )
        if len(its_rows) or not (nothing or (wanted and wanted[index])):
            continue
        if packed.whole:
            raise UserError(
                f"{name}: nothing is to be predicted in {packed.documents} examples, cut to batch.length="
                f"{its_rows.length}; give examples with shorter prompts or a larger length"
            )
        needed = 2 if part == "heldout" else its_rows.length + 1
        raise UserError(
            f"{name}: {packed.tokens} tokens from {packed.documents} documents, but one row of "
            f"batch.length={its_rows.length} needs {needed}; give more text or a smaller length"
        )


def _notes(part: str, numbers: list[int], rows: list[SourceOfRows]) -> list[str]:
    return [
        f"data.{part}[{number}]: {its_rows.cut} examples are longer than batch.length={its_rows.length} and were "
        f"cut at their end, {its_rows.left_out} more left out, as nothing to predict remained"
        for number, its_rows in zip(numbers, rows, strict=True)
        if isinstance(its_rows, ExampleRows) and (its_rows.cut or its_rows.left_out)
    ]
