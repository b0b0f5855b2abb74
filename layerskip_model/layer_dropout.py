"""Layer dropout: p_{l,t} = S(t) D(l) p_max and the per-sample skip (arXiv 2404.16710, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SHAPES: dict[str, Callable[[float], float]] = {
    "exp": lambda x: math.exp(x * math.log(2.0)) - 1.0,  # D(l) and S(t) of the paper
    "linear": lambda x: x,
    "log": lambda x: math.log2(1.0 + x),
    "sine": lambda x: math.sin(0.5 * math.pi * x),
    "sigmoid": lambda x: 1.0 / (1.0 + math.exp(-10.0 * (x - 0.5))),
    "saturating": lambda x: (
        1.0 - math.exp(-100.0 * x)
    ),  # over time in Progressive Layer Dropping (2010.13369)
    "constant": lambda x: 1.0,
}
"""How a rate grows from 0 to 1 over the depth or over the run, as a function of the fraction done."""


@dataclass(frozen=True)
class LayerDropout:
    """Which samples skip which layer at which optimizer step: a pure function, nothing to save.

    Attributes:
        p_max: the largest rate, reached at the last layer (and, unless S is constant, the last step).
        over_depth, over_time: names in SHAPES for D(l) and S(t).
        layers: Python slice syntax ("1::2") for the layers that may be dropped, or "all".
        num_layers, total_steps: L and T.
        seed: with the step, the global row and the layer it decides each sample.
    """

    p_max: float
    over_depth: str
    over_time: str
    layers: str
    num_layers: int
    total_steps: int
    seed: int

    def rates(self, step: int) -> list[float]:
        """p_{l,t} for every layer l at optimizer step t."""
        over_time = SHAPES[self.over_time](step / max(self.total_steps - 1, 1))
        droppable = set(layer_slice(self.layers, self.num_layers))
        depth = max(self.num_layers - 1, 1)
        return [
            over_time * SHAPES[self.over_depth](layer / depth) * self.p_max if layer in droppable else 0.0
            for layer in range(self.num_layers)
        ]

    def kept(self, step: int, rows: Sequence[int]) -> np.ndarray:
        """Whether each sample runs each layer. Global row indexes [batch] -> bool [layers, batch].

        The decision depends on (seed, step, row, layer) only, so it is the same however the global batch is
        split over ranks and micro-batches, in a recomputed forward, and after a resume.
        """
        layers = np.arange(self.num_layers, dtype=np.uint64)[:, None]
        draws = uniform_hash(self.seed, step, np.asarray(rows, dtype=np.uint64)[None, :], layers)
        return draws >= np.asarray(self.rates(step))[:, None]


def layer_slice(text: str, num_layers: int) -> range:
    """The layers that "all" or slice syntax such as "1::2" names. Raises ValueError for anything else."""
    if text == "all":
        return range(num_layers)
    parts = text.split(":")
    try:
        if not 2 <= len(parts) <= 3:
            raise ValueError(text)
        return range(num_layers)[slice(*(int(part) if part.strip() else None for part in parts))]
    except ValueError:
        raise ValueError(f"'{text}' is neither 'all' nor a slice such as '1::2'") from None


def uniform_hash(seed: int, step: int, *keys: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) that look random and depend on nothing but the arguments (SplitMix64 finaliser).

    `keys` are uint64 arrays of shapes that go together; their shape is that of the result. Every argument is
    mixed in on its own: (seed 0, step 1) and (seed 1, step 0) have nothing in common.
    """
    state: np.ndarray = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in (np.asarray(seed, dtype=np.uint64), np.asarray(step, dtype=np.uint64), *keys):
            state = (state ^ key) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def run_kept_rows(
    call: Callable[..., Tensor], keep: np.ndarray, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """x + M f(x), section 4.1: run a layer on the kept samples only, the others pass unchanged.

    `call` is the layer (residual included), `keep` bool [batch], `hidden` [batch, seq, hidden]. Masks and
    positions with a batch dimension follow the samples. When no sample is kept the layer still runs on one
    token, whose output is thrown away: every rank then calls every layer, so that its collectives and gradient
    hooks match, and its parameters get zero gradients rather than none.

    Raises ValueError where `keep` and `hidden` are not of the same batch.
    """
    if len(keep) != hidden.shape[0]:
        raise ValueError(f"{len(keep)} decisions for hidden states of shape {tuple(hidden.shape)}")
    if keep.all():
        return call(hidden, *args, **kwargs)
    if not keep.any():
        token = hidden[:1, :1].detach().clone().requires_grad_(torch.is_grad_enabled())
        args, kwargs = _first_token((args, kwargs), *hidden.shape[:2])
        return _PassBy.apply(hidden, call(token, *args, **kwargs))
    runs = _runs(keep)
    args, kwargs = _chosen((args, kwargs), runs, len(keep))
    kept, others = _Take.apply(hidden, runs)
    return _Put.apply(call(kept, *args, **kwargs).to(hidden.dtype), others, runs)


@dataclass(frozen=True)
class _Run:
    """Neighbours in a batch that share a decision. `place` is theirs among the kept samples alone."""

    rows: slice
    place: slice | None  # None: dropped


def _runs(keep: np.ndarray) -> list[_Run]:
    """A batch's decisions as runs: a few slices, which need no index on the device."""
    ends = [*(np.flatnonzero(keep[1:] != keep[:-1]) + 1).tolist(), len(keep)]
    runs, start, kept = [], 0, 0
    for end in ends:
        place = slice(kept, kept + end - start) if keep[start] else None
        runs.append(_Run(slice(start, end), place))
        kept += (end - start) * bool(keep[start])
        start = end
    return runs


def _take(whole: Tensor, runs: list[_Run]) -> Tensor:
    """The kept samples: [batch, ...] -> [kept, ...]; a view where they are neighbours."""
    parts = [whole[run.rows] for run in runs if run.place is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _put(kept: Tensor, others: Tensor, runs: list[_Run]) -> Tensor:
    """The batch in its order: kept samples from `kept` [kept, ...], dropped ones from `others` [batch, ...]."""
    return torch.cat([others[run.rows] if run.place is None else kept[run.place] for run in runs])


class _Take(torch.autograd.Function):
    """The kept samples of the stream, and the stream itself for `_Put`: each way one copy of the batch at most."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, runs: list[_Run]) -> tuple[Tensor, Tensor]:
        ctx.runs = runs
        return _take(hidden, runs), hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kept: Tensor, others: Tensor) -> tuple[Tensor, None]:
        return _put(kept, others, ctx.runs), None


class _Put(torch.autograd.Function):
    """The layer's outputs in their places. The kept rows of the gradient it gives back mean nothing to `_Take`."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, others: Tensor, runs: list[_Run]) -> Tensor:
        ctx.runs = runs
        return _put(kept, others, runs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, whole: Tensor) -> tuple[Tensor, Tensor, None]:
        return _take(whole, ctx.runs), whole, None


class _PassBy(torch.autograd.Function):
    """The stream as it is, with a layer's output in the graph that changes nothing and gets a zero gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, whole: Tensor) -> tuple[Tensor, Tensor]:
        return whole, torch.zeros_like(ctx.saved_tensors[0])


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` of every tensor inside tuples and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(part, change) for part in value)
    if isinstance(value, dict):
        return {key: _map_tensors(part, change) for key, part in value.items()}
    return value


def _chosen(value: Any, runs: list[_Run], batch: int) -> Any:
    """The kept samples of every tensor that has a batch dimension."""
    return _map_tensors(value, lambda t: _take(t, runs) if t.dim() >= 2 and t.shape[0] == batch else t)


def _first_token(value: Any, batch: int, length: int) -> Any:
    """Masks [b, heads, length, length] and positions [b, length, ...] for the first token of the first sample."""

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or tensor.shape[0] not in (1, batch):
            return tensor
        if tensor.dim() == 4 and tensor.shape[-2:] == (length, length):
            return tensor[:1, :, :1, :1]
        return tensor[:1, :1] if tensor.shape[1] == length else tensor

    return _map_tensors(value, cut)
