"""The lean decoding view of a model: its own decoder layers, called one by one over a cache of ours.

Nothing is put on the model, and there is no fork per model type: what differs between models (attention
kinds, windows, rotary tables) is read from the model, and the whole is checked against its own logits when a
runner is made.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone, model_device
from layerskip_model.errors import UserError

# The largest difference from the model's own logits that is rounding, relative to the largest logit. Norms
# and softmaxes compute in float32 in a float64 model too.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
KINDS = ("full_attention", "sliding_attention")
IMPLEMENTATIONS = ("sdpa", "eager")


class KeyValues(Protocol):
    """Where a layer leaves the keys and values of its rows, and from where it gets those it may see."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        """Write those of these rows, [batch, kv heads, rows, head dim]; return all, [.., keys, head dim]."""
        ...


@dataclass(frozen=True)
class Tables:
    """Positions and rotary tables of one decode, made once.

    Attributes:
        position: 0, 1, 2, ... [1, capacity].
        rotary: attention kind -> (cos, sin), each [1, capacity, rotary dim].
    """

    position: Tensor
    rotary: dict[str, tuple[Tensor, Tensor]]

    def span(self, begin: int, end: int) -> dict[str, tuple[Tensor, Tensor]]:
        """The tables of positions begin..end-1, as views [1, end - begin, rotary dim]."""
        return {kind: (cos[:, begin:end], sin[:, begin:end]) for kind, (cos, sin) in self.rotary.items()}

    def at(self, position: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The tables of any positions [batch, rows] -> [batch, rows, rotary dim]."""
        return {kind: (cos[0][position], sin[0][position]) for kind, (cos, sin) in self.rotary.items()}


@dataclass(frozen=True)
class Context:
    """What the layers of one forward need beside the hidden states [batch, rows, hidden].

    Attributes:
        cache: takes the rows' keys and values, gives the visible ones.
        position: [batch or 1, rows].
        rotary: attention kind -> (cos, sin) of those positions.
        masks: attention kind -> additive mask [batch or 1, 1, rows, keys], or None where none is needed.
    """

    cache: KeyValues
    position: Tensor
    rotary: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, Tensor | None]


class Forward(NamedTuple):
    """What a pass through some layers gives.

    Attributes:
        hidden: the states that leave the last of them, [batch, rows, hidden].
        logits: [batch, rows, vocab], if wanted.
        states: layer -> the states that left it, [batch, rows, hidden], for those wanted.
    """

    hidden: Tensor
    logits: Tensor | None
    states: dict[int, Tensor]


class Runner:
    """Embed tokens, run any span of layers, read logits: the three steps that decoding is made of.

    Attributes:
        backbone: the model's parts; its `logits` is the one used here.
        windows: attention kind -> sliding window in tokens, None for full attention.

    Raises UserError for a model that cannot be run layer by layer, or whose logits then differ from its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.backbone = Backbone(model)
        self.model = model
        self.num_layers = self.backbone.num_layers
        self.vocab_size = self.backbone.vocab_size
        self.context_length = self.backbone.context_length
        self.device = model_device(self.backbone.embed)
        self.dtype: torch.dtype = self.backbone.embed.weight.dtype  # type: ignore[assignment]
        config = self.backbone.config
        self.model_type: str = config.model_type
        self._attention: str = config._attn_implementation
        if self._attention not in IMPLEMENTATIONS:
            raise UserError(
                f"attn_implementation='{self._attention}' takes no mask of ours; load the model with "
                "attn_implementation='sdpa' or 'eager'"
            )
        self.kinds, self.windows = attention_kinds(config, self.num_layers)
        check_against_model(self)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, rows] -> hidden states that enter layer 0, [batch, rows, hidden]."""
        return self.backbone.embed(tokens)

    def run(self, hidden: Tensor, start: int, stop: int, context: Context) -> Tensor:
        """Run layers start..stop-1. Hidden states [batch, rows, hidden] -> the same shape."""
        for layer, kind in zip(self.backbone.layers[start:stop], self.kinds[start:stop], strict=True):
            output = layer(
                hidden,
                attention_mask=context.masks[kind],
                position_ids=context.position,
                past_key_values=context.cache,
                use_cache=True,
                position_embeddings=context.rotary[kind],
            )
            hidden = output if isinstance(output, Tensor) else output[0]
        return hidden

    def forward(
        self,
        inputs: Tensor,
        start: int,
        stop: int,
        context: Context,
        *,
        head: bool = True,
        needs: tuple[int, ...] = (),
    ) -> Forward:
        """A pass through layers start..stop-1, from tokens [batch, rows] where these begin at layer 0.

        `inputs` are hidden states [batch, rows, hidden] otherwise. `head`: whether logits are wanted. `needs`:
        layers whose outgoing states are.
        """
        hidden = inputs if inputs.is_floating_point() else self.embed(inputs)
        hidden, states = self.run_reading(hidden, start, stop, context, needs)
        return Forward(hidden, self.logits(hidden) if head else None, states)

    def run_reading(
        self, hidden: Tensor, start: int, stop: int, context: Context, layers: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`run`, and the states [batch, rows, hidden] that leave those of `layers` that are run."""
        states = {}
        for layer in sorted(set(layers)):
            if start <= layer < stop:
                hidden = states[layer] = self.run(hidden, start, layer + 1, context)
                start = layer + 1
        return self.run(hidden, start, stop, context), states

    def logits(self, hidden: Tensor) -> Tensor:
        """The final norm and the LM head after any layer. [..., hidden] -> [..., vocab]."""
        return self.backbone.logits(hidden)

    def tables(self, horizon: int, capacity: int) -> Tables:
        """Positions 0..capacity-1 and their rotary tables.

        Rotary scalings that depend on the length of the text (dynamic, longrope) are those of a text of
        `horizon` tokens for the whole decode, so that all keys in the cache are alike, whatever the strategy.
        Positions beyond it are drafted but never emitted, and share the last entry.
        """
        rotary_emb = self.backbone.base.rotary_emb
        position = torch.arange(capacity, device=self.device)[None]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        types = rotary_emb.rope_type
        types = set(types.values()) if isinstance(types, dict) else {types}
        covered = horizon if types & {"dynamic", "longrope"} else capacity
        per_kind = "layer_type" in inspect.signature(rotary_emb.forward).parameters
        rotary = {}
        for kind in self.windows:
            extra = (kind,) if per_kind else ()
            cos, sin = rotary_emb(like, position[:, :covered], *extra)
            rotary[kind] = (_extended(cos, capacity), _extended(sin, capacity))
        return Tables(position, rotary)

    def chain_context(self, cache: KeyValues, tables: Tables, begin: int, count: int) -> Context:
        """The context of rows at positions begin..begin+count-1, which see everything before them.

        `cache` has to return the keys of positions 0..begin+count-1, in this order. One row needs no mask,
        and neither does a prefill under sdpa, unless a sliding window is shorter than the text.
        """
        end = begin + count
        no_mask = count == 1 or (begin == 0 and self._attention == "sdpa")
        masks: dict[str, Tensor | None] = {}
        for kind, window in self.windows.items():
            if no_mask and (window is None or end <= window):
                masks[kind] = None
            else:
                key = tables.position[:, :end]  # [1, keys]
                query = tables.position[:, begin:end, None]  # [1, rows, 1]
                masks[kind] = self._mask(kind, key[:, None] <= query, query, key)
        return Context(cache, tables.position[:, begin:end], tables.span(begin, end), masks)

    def context(
        self, cache: KeyValues, tables: Tables, position: Tensor, seen: Tensor, key_position: Tensor
    ) -> Context:
        """The context of any rows: trees, and rows of different lengths.

        Shapes: position [batch, rows]; seen [batch, rows, keys], True where a row may see a key (every row
        must see itself); key_position [batch or 1, keys], for the sliding windows.
        """
        query = position[..., None]
        masks: dict[str, Tensor | None] = {
            kind: self._mask(kind, seen, query, key_position) for kind in self.windows
        }
        return Context(cache, position, tables.at(position), masks)

    def _mask(self, kind: str, seen: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Additive mask [batch, 1, rows, keys]: eager wants it so, and sdpa would make it in every layer."""
        window = self.windows[kind]
        if window is not None:
            seen = seen & (query - key[:, None] < window)
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(self.dtype).min)[:, None]


def attention_kinds(config: Any, num_layers: int) -> tuple[list[str], dict[str, int | None]]:
    """Each layer's attention kind, and the window of each kind. Raises UserError for a kind not supported."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # Mistral and Phi-3: a window on every layer
        kinds = [KINDS[0] if window is None else KINDS[1]] * num_layers
    strange = sorted(set(kinds) - set(KINDS))
    if strange:
        raise UserError(
            f"model type '{config.model_type}' has layers of type '{strange[0]}'; "
            f"only {' and '.join(KINDS)} can be decoded here"
        )
    windows = {KINDS[0]: None, KINDS[1]: window}
    return list(kinds), {kind: windows[kind] for kind in KINDS if kind in kinds}


def check_against_model(runner: Runner) -> None:
    """Compare a prefill and a chunk after it, entered in mid-stack, with the model's own logits.

    Raises UserError with the model type and the largest difference where they differ by more than rounding.
    """
    if runner.model.training:
        raise ValueError("the model is in training mode: call model.eval() before making a Runner")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(runner.vocab_size, (1, 7), generator=generator).to(runner.device)
    with torch.inference_mode():
        expected = runner.model(input_ids=tokens, use_cache=False).logits
        try:
            actual = _logits_in_two_chunks(runner, tokens)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"model type '{runner.model_type}' cannot be decoded layer by layer ({error}); "
                "use a model such as Llama, Mistral, Qwen, Gemma, Phi-3 or OLMo"
            ) from error
    difference = (actual - expected).abs().max().item()
    allowed = TOLERANCE[expected.dtype] * expected.abs().max().item()
    if not difference <= allowed:  # NaN fails too
        raise UserError(
            f"model type '{runner.model_type}' cannot be decoded here: run layer by layer, its logits are "
            f"off by {difference:.3g} (allowed {allowed:.3g}); use a Llama, Mistral, Qwen or Gemma model"
        )


def _logits_in_two_chunks(runner: Runner, tokens: Tensor) -> Tensor:
    """Logits [1, 7, vocab] by a prefill of 4 tokens and a chunk of 3, each split in mid-stack."""
    cache = _Appending()
    tables = runner.tables(7, 7)
    middle = (runner.num_layers + 1) // 2
    parts = []
    for begin, count in ((0, 4), (4, 3)):
        context = runner.chain_context(cache, tables, begin, count)
        hidden = runner.run(runner.embed(tokens[:, begin : begin + count]), 0, middle, context)
        parts.append(runner.logits(runner.run(hidden, middle, runner.num_layers, context)))
    return torch.cat(parts, dim=1)


class _Appending:
    """The simplest cache: each update appends to what its layer already has."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        if layer_idx in self.layers:
            old_keys, old_values = self.layers[layer_idx]
            keys, values = torch.cat((old_keys, keys), dim=2), torch.cat((old_values, values), dim=2)
        self.layers[layer_idx] = keys, values
        return keys, values


def _extended(table: Tensor, capacity: int) -> Tensor:
    """Repeat the last entry of [1, length, dim] up to [1, capacity, dim]."""
    missing = capacity - table.shape[1]
    return torch.cat((table, table[:, -1:].expand(-1, missing, -1)), dim=1) if missing > 0 else table
