"""Captured passes, for `--compile`: each pass through some layers is compiled once and then called as one thing.

On a CPU torch.compile makes one function of a pass, for any length of the text. On CUDA a pass is compiled for a fixed
length and recorded into a CUDA graph: where the rows stand travels in a tensor, masks are made inside the graph, and
attention reads the cache up to the next multiple of BUCKET. Cache and tables are kept from one decode to the next,
so that captured passes find them where they were. Prefills run as always, for every prompt has a length of its
own; so do trees.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eval.decoding.cache import Cache, SlotView, SpanView
from layerskip_model.context import Context, Ragged, Span, Tables
from layerskip_model.errors import UserError
from layerskip_model.layer_runner import LayerRunner
from layerskip_model.runner import Forward, Runner

BUCKET = 256  # slots
WARM_UPS = 3  # runs before a recording, for compilation and the libraries' own workspaces
CHECKED = ("", "inputs", "seen", "begin")  # of what a pass is given; "" are relations between sizes
_numbers = itertools.count()


def captured(runner: Runner) -> Runner:
    """The same runner with captured passes. Raises UserError for a model whose parts lie on several devices."""
    if any(hasattr(module, "_hf_hook") for module in runner.model.modules()):
        raise UserError("--compile needs the whole model on one device; leave out --device_map")
    return GraphRunner(runner) if runner.device.type == "cuda" else CompiledRunner(runner)


def new_cache(runner: LayerRunner, batch: int, capacity: int) -> Cache:
    """The cache of a decode on this runner."""
    if isinstance(runner, _Capturing):
        return runner.kept_cache(batch, capacity)
    return Cache(batch, runner.num_layers, capacity)


class Pass(NamedTuple):
    """What a pass does, whatever it is given: layers start..stop-1, and what it returns beside the states."""

    start: int
    stop: int
    head: bool
    needs: tuple[int, ...]


class _Capturing(Runner):
    """A runner that shares everything with another one and captures passes over chains."""

    fixed_shapes = True

    def __init__(self, runner: Runner) -> None:
        self.__dict__.update(runner.__dict__)
        self._caches: dict[int, Cache] = {}  # by batch size
        self._kept: dict[int, Tables] = {}  # by capacity
        self._adopted: dict[int, Tables] = {}  # whose content they have
        self._passes: dict[tuple[Any, ...], Callable[..., Forward]] = {}

    def kept_cache(self, batch: int, capacity: int) -> Cache:
        """The cache of the last decode of that batch size again, if it is large enough."""
        kept = self._caches.get(batch)
        if kept is None or kept.capacity < capacity:
            self._passes = {key: work for key, work in self._passes.items() if key[0] is not kept}
            kept = self._caches[batch] = Cache(batch, self.num_layers, bucketed(capacity))
        kept.lengths = [0] * batch
        return kept

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
        """See `Runner.forward`."""
        is_prefill = isinstance(context, Span) and context.begin < 2  # 0 and 1 would not be symbolic
        if is_prefill or not isinstance(context, Span | Ragged):
            return super().forward(inputs, start, stop, context, head=head, needs=needs)
        return self._captured(inputs, context, Pass(start, stop, head, needs))

    def _captured(self, inputs: Tensor, context: Span | Ragged, work: Pass) -> Forward:
        raise NotImplementedError

    def _tables(self, tables: Tables) -> Tables:
        """The kept tables, with the content of these: rotary tables may differ from decode to decode."""
        capacity = tables.position.shape[1]
        kept = self._kept.setdefault(capacity, tables)
        if self._adopted.get(capacity) is not tables:
            self._adopted[capacity] = tables
            for kind, pair in tables.rotary.items():
                for ours, theirs in zip(kept.rotary[kind], pair, strict=True):
                    ours.copy_(theirs)
        return kept


class CompiledRunner(_Capturing):
    """torch.compile for every pass and number of rows, with a symbolic number of cached tokens."""

    def _captured(self, inputs: Tensor, context: Span | Ragged, work: Pass) -> Forward:
        view: Any = context.cache
        cache: Cache = view.cache
        tables = self._tables(context.tables)
        seen = tables.position[:, : context.end]
        begin = context.begin if isinstance(context, Ragged) else None
        key = (cache, work, inputs.shape, begin is None)
        if key not in self._passes:
            if isinstance(context, Span) and inputs.shape[1] > 1:
                for kind in tables.windows:
                    tables.chain_mask(
                        kind, context.begin, inputs.shape[1]
                    )  # made now, and a view of it later
            torch._dynamo.mark_dynamic(seen, 1)
            self._passes[key] = compiled(_chain_pass)
            self.captures += 1
        return self._passes[key](inputs, seen, begin, self, work, _Stored(cache.keys, cache.values), tables)


class GraphRunner(_Capturing):
    """A CUDA graph for every pass and shape."""

    def _captured(self, inputs: Tensor, context: Span | Ragged, work: Pass) -> Forward:
        view: Any = context.cache
        cache: Cache = view.cache
        extent = min(bucketed(context.end), cache.capacity)
        tables = self._tables(context.tables)
        key = (cache, work, inputs.shape, extent)
        if key not in self._passes:
            self._passes[key] = _Graph(self, inputs, tables, cache, extent, work)
            self.captures += 1
        return self._passes[key](inputs, context.begin)


class _Graph:
    """One recorded pass, with the tensors that it reads."""

    def __init__(
        self, runner: Runner, inputs: Tensor, tables: Tables, cache: Cache, extent: int, work: Pass
    ) -> None:
        self.inputs = inputs.clone()
        self.begin = torch.zeros((inputs.shape[0], 1), dtype=torch.long, device=inputs.device)
        function = compiled(_chain_pass) if inputs.device.type == "cuda" else _chain_pass
        seen, stored = tables.position[:, :extent], _Stored(cache.keys, cache.values)

        def run() -> Forward:
            return function(self.inputs, seen, self.begin, runner, work, stored, tables)

        self._run = recorded(run, inputs.device) if inputs.device.type == "cuda" else run

    def __call__(self, inputs: Tensor, begin: int | Tensor) -> Forward:
        """The pass over these rows. What it returns is the caller's to keep."""
        self.inputs.copy_(inputs)
        if isinstance(begin, int):
            self.begin.fill_(begin)
        else:
            self.begin.copy_(begin)
        hidden, logits, states = self._run()
        copies = {layer: state.clone() for layer, state in states.items()}
        return Forward(hidden.clone(), None if logits is None else logits.clone(), copies)


def _chain_pass(
    inputs: Tensor,
    seen: Tensor,
    begin: Tensor | None,
    runner: Runner,
    work: Pass,
    stored: _Stored,
    tables: Tables,
) -> Forward:
    """The pass that is captured, over chains that begin at `begin` [batch, 1], or else end where `seen` ends.

    `seen` [1, keys]: as many cached tokens as attention reads.
    """
    count, end = inputs.shape[1], seen.shape[1]
    cache: Any = stored
    if begin is None:
        context: Context = runner.span(SpanView(cache, end - count, end), tables, end - count, count)
    else:
        row = torch.arange(inputs.shape[0], device=inputs.device)[:, None]
        ahead = torch.arange(count, device=inputs.device)[None]
        context = runner.ragged(SlotView(cache, row, begin + ahead, end), tables, begin, ahead, end)
    start, stop, head, needs = work
    return Runner.forward(runner, inputs, start, stop, context, head=head, needs=needs)


class _Stored(NamedTuple):
    """As much of a `Cache` as its views read."""

    keys: list[Tensor | None]
    values: list[Tensor | None]

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Tensors that the prefill has made."""
        stored_keys, stored_values = self.keys[index], self.values[index]
        assert stored_keys is not None
        assert stored_values is not None
        return stored_keys, stored_values


def compiled(function: Callable[..., Forward]) -> Callable[..., Forward]:
    """torch.compile of a copy of the function, trusting that weights, cache and tables stay what they are.

    torch checks at each call whether what it compiled for is still so, weight by weight, and on a small model that
    takes as long as a layer does. Only what differs from call to call is checked here. A function's compilations
    are kept with its code, so each one gets a copy of the code: none can be taken for another's.
    """
    name = f"{function.__name__}_{next(_numbers)}"
    twin = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    trusted: Any = {"guard_filter_fn": lambda guards: [guard.name in CHECKED for guard in guards]}
    return torch.compile(twin, fullgraph=True, options=trusted)


def recorded(run: Callable[[], Forward], device: torch.device) -> Callable[[], Forward]:
    """A CUDA graph of `run`; each call of it overwrites what the one before returned."""
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()

    def replay() -> Forward:
        graph.replay()
        return output

    return replay


def bucketed(slots: int) -> int:
    """The next multiple of BUCKET."""
    return -(-slots // BUCKET) * BUCKET
