"""Shaping: what is done to logits before a token is chosen, by the settings of a generation config.

The same processors as in transformers' `generate`, in its order (`GenerationMixin._get_logits_processor`), so
that our tokens are distributed as its are. The target and the drafters are shaped alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    InfNanRemoveLogitsProcessor,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from eval.decoding.tree import Draft
from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import one_line

if TYPE_CHECKING:
    from eval.decoding.drafters.base import State

Path = slice | list[int]  # which tokens of a draft lead from the root, left out, to a node


@dataclass(frozen=True)
class Place:
    """What processors depend on beside their setting; `eos` may be empty."""

    prompt_length: int
    eos: list[int]
    device: torch.device


@dataclass(frozen=True)
class Setting:
    """A setting of a generation config that shapes logits.

    Attributes:
        make: its processor, given the setting's value.
        off: the values, beside None, that change nothing.
        contextual: it looks at the text so far, if only at its length.
        needs_eos: it is about end-of-sequence tokens and does nothing where there are none.
    """

    make: Callable[[Any, Place], LogitsProcessor]
    off: tuple[Any, ...] = ()
    contextual: bool = False
    needs_eos: bool = False


PROCESSORS = {
    "sequence_bias": Setting(lambda value, at: SequenceBiasLogitsProcessor(value), contextual=True),
    "repetition_penalty": Setting(
        lambda value, at: RepetitionPenaltyLogitsProcessor(float(value)), off=(1.0,), contextual=True
    ),
    "no_repeat_ngram_size": Setting(
        lambda value, at: NoRepeatNGramLogitsProcessor(value), off=(0,), contextual=True
    ),
    "bad_words_ids": Setting(
        lambda value, at: NoBadWordsLogitsProcessor(value, at.eos or None), off=([],), contextual=True
    ),
    "min_length": Setting(
        lambda value, at: MinLengthLogitsProcessor(value, at.eos, device=str(at.device)),
        off=(0,),
        contextual=True,
        needs_eos=True,
    ),
    "min_new_tokens": Setting(
        lambda value, at: MinNewTokensLengthLogitsProcessor(
            at.prompt_length, value, at.eos, device=str(at.device)
        ),
        off=(0,),
        contextual=True,
        needs_eos=True,
    ),
    "remove_invalid_values": Setting(lambda value, at: InfNanRemoveLogitsProcessor(), off=(False,)),
    "exponential_decay_length_penalty": Setting(
        lambda value, at: ExponentialDecayLengthPenalty(value, at.eos, at.prompt_length),
        contextual=True,
        needs_eos=True,
    ),
    "suppress_tokens": Setting(
        lambda value, at: SuppressTokensLogitsProcessor(value, device=str(at.device)), off=([],)
    ),
    "begin_suppress_tokens": Setting(
        lambda value, at: SuppressTokensAtBeginLogitsProcessor(
            value, at.prompt_length, device=str(at.device)
        ),
        off=([],),
        contextual=True,
    ),
}
"""For greedy decoding and for sampling, in transformers' order."""

WARPERS = {
    "temperature": Setting(lambda value, at: TemperatureLogitsWarper(float(value)), off=(1.0,)),
    "top_h": Setting(lambda value, at: TopHLogitsWarper(value)),
    "top_k": Setting(lambda value, at: TopKLogitsWarper(value), off=(0,)),
    "top_p": Setting(lambda value, at: TopPLogitsWarper(value), off=(1.0,)),
    "min_p": Setting(lambda value, at: MinPLogitsWarper(value)),
    "typical_p": Setting(lambda value, at: TypicalLogitsWarper(value), off=(1.0,)),
    "epsilon_cutoff": Setting(lambda value, at: EpsilonLogitsWarper(value), off=(0.0,)),
    "eta_cutoff": Setting(lambda value, at: EtaLogitsWarper(value, device=str(at.device)), off=(0.0,)),
}
"""For sampling only, after the processors."""


class Shaping:
    """Shapes logits by the settings given, for the target and for drafters.

    Settings that look at the text see, for each row and node, its prompt, what was emitted and the drafts up
    to that node. A row is shaped as if it were alone. (In transformers the padding of a batch counts for
    `min_length`.) Only settings that look at the text cost a loop over rows and nodes.

    Raises UserError for values that the processors do not take.
    """

    def __init__(self, settings: dict[str, Any], eos_token_ids: Collection[int], vocab_size: int) -> None:
        known = {**PROCESSORS, **WARPERS}
        self._eos = sorted(eos_token_ids)
        self._settings = {
            name: value for name, value in settings.items() if self._eos or not known[name].needs_eos
        }
        self.contextual = any(known[name].contextual for name in self._settings)
        self._made: dict[tuple[int, torch.device], tuple[list[LogitsProcessor], list[LogitsProcessor]]] = {}
        for name, value in self._settings.items():
            _check(name, value, self._eos, vocab_size)

    def after_chain(self, state: State, logits: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """Shape what a drafter thinks after a chain: logits [batch, 1, vocab], tokens [batch, 1] each, root first.

        Float32, or float64 as the logits are. Does not wait for the device. (transformers' processors of
        `eta_cutoff` and `top_h` do, and before 5.18 or so that of `no_repeat_ngram_size`.)
        """
        logits = _precise(logits)
        if self.contextual:
            paths: list[Path] = [slice(1, len(tokens))]
            logits = self._in_context(state, logits, torch.cat(list(tokens), dim=1), [paths] * state.batch)
        return self._without_context(logits)

    def after_nodes(self, state: State, logits: Tensor, draft: Draft) -> Tensor:
        """Shape what follows the last m nodes of a draft (all of them, mostly), logits [batch, m, vocab].

        Float32, or float64 as the logits are. Waits for the device only where the draft is a tree and a
        setting looks at the text.
        """
        logits = _precise(logits)
        if self.contextual:
            first = draft.num_nodes - logits.shape[1]
            paths = [nodes[first:] for nodes in node_paths(draft)]
            logits = self._in_context(state, logits, draft.tokens, paths)
        return self._without_context(logits)

    def after_texts(self, texts: Sequence[list[int]], prompt_length: int, logits: Tensor) -> Tensor:
        """Shape what follows whole texts, whose first `prompt_length` tokens are the prompt, logits [texts, vocab]."""
        logits = _precise(logits)
        if self.contextual:
            processors, _ = self._for(prompt_length, logits.device)
            shaped = [
                _run(processors, torch.tensor([text], device=logits.device), row[None])
                for text, row in zip(texts, logits, strict=True)
            ]
            logits = torch.cat(shaped)
        return self._without_context(logits[:, None])[:, 0]

    def _in_context(self, state: State, logits: Tensor, tokens: Tensor, paths: list[list[Path]]) -> Tensor:
        """All processors, row by row and node by node. logits [batch, n, vocab], tokens [batch, nodes]."""
        texts = _on_device(state.texts, tokens.device)
        shaped = []
        for row, nodes in enumerate(paths):
            processors, _ = self._for(state.prompt_lengths[row], logits.device)
            text = texts[row, : len(state.texts[row])]
            for node, path in enumerate(nodes):
                so_far = torch.cat([text, tokens[row, path]])[None]  # [1, length]
                shaped.append(_run(processors, so_far, logits[row, node][None]))
        return torch.cat(shaped).view_as(logits)

    def _without_context(self, logits: Tensor) -> Tensor:
        """The processors, if no text is needed for them, and the warpers. logits [batch, n, vocab]."""
        processors, warpers = self._for(0, logits.device)
        if not self.contextual:
            warpers = processors + warpers
        if not warpers:
            return logits
        flat = logits.flatten(0, 1)  # [batch * n, vocab]
        no_text = torch.empty((1, 0), dtype=torch.int64, device=logits.device)
        return _run(warpers, no_text, flat).view_as(logits)

    def _for(
        self, prompt_length: int, device: torch.device
    ) -> tuple[list[LogitsProcessor], list[LogitsProcessor]]:
        """The processors and the warpers for a prompt of this length, made once."""
        key = (prompt_length, device)
        if key not in self._made:
            place = Place(prompt_length, self._eos, device)
            self._made[key] = (self._make(PROCESSORS, place), self._make(WARPERS, place))
        return self._made[key]

    def _make(self, kinds: dict[str, Setting], place: Place) -> list[LogitsProcessor]:
        return [kinds[name].make(self._settings[name], place) for name in kinds if name in self._settings]


def node_paths(draft: Draft) -> list[list[Path]]:
    """Per row and node: which of the draft's tokens follow the root up to that node."""
    if draft.is_chain:
        return [[slice(1, node + 1) for node in range(draft.num_nodes)]] * draft.tokens.shape[0]
    paths: list[list[Path]] = []
    for parents in draft.parents.tolist():
        nodes: list[list[int]] = [[]]
        for node in range(1, draft.num_nodes):
            nodes.append([*nodes[parents[node]], node] if parents[node] >= 0 else [node])
        paths.append(list(nodes))
    return paths


def _check(name: str, value: Any, eos: list[int], vocab_size: int) -> None:
    """Make a setting's processor and run it once: some look at their values only then."""
    place = Place(prompt_length=1, eos=eos, device=torch.device("cpu"))
    try:
        processor = {**PROCESSORS, **WARPERS}[name].make(value, place)
        _run([processor], torch.zeros((1, 8), dtype=torch.int64), torch.zeros((1, vocab_size)))
    except Exception as error:  # whatever a processor makes of a wrong value
        raise UserError(
            f"generation_config.{name}={value!r:.60} cannot be used: {one_line(error)}; correct the checkpoint's "
            "generation_config.json"
        ) from error


def _run(processors: Sequence[LogitsProcessor], text: Tensor, scores: Tensor) -> Tensor:
    """One after the other. text [rows or 1, length], scores [rows, vocab]."""
    for processor in processors:
        scores = processor(text, scores)
    return scores


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _on_device(texts: list[list[int]], device: torch.device) -> Tensor:
    """Texts side by side, [batch, longest], padded with 0; copied without waiting for the device."""
    width = max(map(len, texts))
    padded = [text + [0] * (width - len(text)) for text in texts]
    return torch.tensor(padded, pin_memory=device.type == "cuda").to(device, non_blocking=True)
