"""Captured passes, for `--compile`: each pass through some layers is compiled once and then called as one thing.

On a CPU torch.compile makes one function of a pass, for any number of rows and any length of the text. On CUDA a pass
of fixed shape is compiled, recorded into a CUDA graph and replayed: where the rows stand travels in a tensor, masks
are made inside the graph, attention reads the cache up to the next multiple of BUCKET, and the cache's tensors are
kept from one decode to the next. Prefills run as always, for every prompt has a length of its own; so do trees.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from eval.decoding.cache import Cache, SlotView, SpanView
from layerskip_model.context import Context, KeyValues, Ragged, Rotary, Scattered, Span, Tables
from layerskip_model.errors import UserError
from layerskip_model.runner import Forward, Runner

BUCKET = 256  # slots
CHECKED = ("", "inputs", "end", "row", "slot")  # of what a pass is given; "" are the sizes
_numbers = itertools.count()
WARM_UPS = 3  # runs before a recording, for compilation and the libraries' own workspaces


def captured(runner: Runner) -> Runner:
    """The same runner with captured passes. Raises UserError for a model whose parts lie on several devices."""
    if any(hasattr(module, "_hf_hook") for module in runner.model.modules()):
        raise UserError("--compile needs the whole model on one device; leave out --device_map")
    return GraphRunner(runner) if runner.device.type == "cuda" else CompiledRunner(runner)


def new_cache(runner: Runner, batch: int, capacity: int) -> Cache:
    """The cache of a decode on this runner."""
    return (
        runner.new_cache(batch, capacity)
        if isinstance(runner, GraphRunner)
        else Cache(batch, runner.num_layers, capacity)
    )


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


class CompiledRunner(_Capturing):
    """torch.compile for every pass, with symbolic numbers of rows and of cached tokens."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        self._passes: dict[tuple[Pass, type], Callable[..., Forward]] = {}
        for layer in runner.fused or []:
            for weight in layer.weights():
                torch._dynamo.mark_static(weight)  # their sizes are no symbols

    def _captured(self, inputs: Tensor, context: Span | Ragged, work: Pass) -> Forward:
        key = (work, type(context))
        if key not in self._passes:
            self._passes[key] = compiled(_pass, dynamic=True)
        view: Any = context.cache
        row, slot = (None, None) if isinstance(view, SpanView) else (view.row, view.slot)
        stored = view.cache.keys, view.cache.values
        tables = context.position, context.rotary, context.masks
        return self._passes[key](inputs, context.end, row, slot, self, work, stored, tables)


def _pass(
    inputs: Tensor,
    end: int,
    row: Tensor | None,
    slot: Tensor | None,
    runner: Runner,
    work: Pass,
    stored: tuple[list[Tensor | None], list[Tensor | None]],
    tables: tuple[Tensor, dict[str, Rotary], dict[str, Tensor | None]],
) -> Forward:
    """The pass that is compiled. `row` and `slot` as in a SlotView, None for rows that end a span of `end`."""
    cache: Any = _Stored(*stored)
    if row is None or slot is None:
        view: KeyValues = SpanView(cache, end - inputs.shape[1], end)
    else:
        view = SlotView(cache, row, slot, end)
    start, stop, head, needs = work
    return Runner.forward(runner, inputs, start, stop, _Expanded(view, *tables), head=head, needs=needs)


@dataclass
class _Stored:
    """As much of a `Cache` as its views read."""

    keys: list[Tensor | None]
    values: list[Tensor | None]

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        stored_keys, stored_values = self.keys[index], self.values[index]
        assert stored_keys is not None, "a prefill makes a layer's tensors before anything is captured"
        assert stored_values is not None
        return stored_keys, stored_values


@dataclass
class _Expanded:
    """A context whose tables and masks are made already."""

    cache: KeyValues
    position: Tensor
    rotary: dict[str, Rotary]
    masks: dict[str, Tensor | None]
    is_causal: ClassVar[bool] = False


def compiled(function: Callable[..., Forward], *, dynamic: bool) -> Callable[..., Forward]:
    """torch.compile of a copy of the function, trusting that weights, cache and tables stay what they are.

    torch checks at each call whether what it compiled for is still so, weight by weight, and on a small model that
    takes as long as a layer does. Only the rows are checked here. A function's compilations are kept with its
    code, so each one gets a copy of the code: none can be taken for another's.
    """
    name = f"{function.__name__}_{next(_numbers)}"  # torch tells codes apart by what they hold
    twin = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    trusted: Any = {"guard_filter_fn": lambda guards: [guard.name in CHECKED for guard in guards]}
    return torch.compile(twin, fullgraph=True, dynamic=dynamic, options=trusted)


class GraphRunner(_Capturing):
    """A CUDA graph for every pass and shape."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        self._caches: dict[int, Cache] = {}  # by batch size
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._rotary: dict[int, dict[str, Rotary]] = {}  # by capacity
        self._tables: Tables | None = None

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """The cache of a decode: the last one of that batch size again, if it is large enough."""
        kept = self._caches.get(batch)
        if kept is None or kept.capacity < capacity:
            self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] is not kept}
            kept = self._caches[batch] = Cache(batch, self.num_layers, bucketed(capacity))
        kept.lengths = [0] * batch
        return kept

    def _captured(self, inputs: Tensor, context: Span | Ragged, work: Pass) -> Forward:
        view: Any = context.cache
        cache: Cache = view.cache
        extent = min(bucketed(context.end), cache.capacity)
        self._adopt(context.tables)
        key = (cache, work, inputs.shape, extent)
        if key not in self._graphs:
            self._graphs[key] = _Graph(
                self, inputs, context.begin, cache, self._rotary[cache.capacity], extent, work
            )
        return self._graphs[key].replay(inputs, context.begin)

    def _adopt(self, tables: Tables) -> None:
        """Bring a decode's rotary tables to where the graphs read them."""
        if tables is self._tables:
            return
        self._tables = tables
        kept = self._rotary.setdefault(tables.position.shape[1], tables.rotary)
        for kind, pair in tables.rotary.items():
            for ours, theirs in zip(kept[kind], pair, strict=True):
                ours.copy_(theirs)


class _Graph:
    """One recorded pass, with the tensors that it reads and writes."""

    def __init__(
        self,
        runner: Runner,
        inputs: Tensor,
        begin: int | Tensor,
        cache: Cache,
        rotary: dict[str, Rotary],
        extent: int,
        work: Pass,
    ) -> None:
        batch, rows = inputs.shape[:2]
        device = inputs.device
        self.inputs = inputs.clone()
        self.begin = torch.zeros((batch, 1), dtype=torch.long, device=device)
        self._place(begin)
        key = torch.arange(extent, device=device)[None]
        tables = Tables(key, rotary, runner.dtype, runner.windows)
        function = _static_pass if device.type != "cuda" else compiled(_static_pass, dynamic=False)
        row, ahead = torch.arange(batch, device=device)[:, None], torch.arange(rows, device=device)[None]

        def run() -> Forward:
            return function(
                self.inputs, self.begin, runner, work, (cache.keys, cache.values), tables, row, ahead
            )

        self._run = recorded(run) if device.type == "cuda" else run

    def replay(self, inputs: Tensor, begin: int | Tensor) -> Forward:
        """The pass over these rows. What it returns is the caller's to keep."""
        self.inputs.copy_(inputs)
        self._place(begin)
        hidden, logits, states = self._run()
        copies = {layer: state.clone() for layer, state in states.items()}
        return Forward(hidden.clone(), None if logits is None else logits.clone(), copies)

    def _place(self, begin: int | Tensor) -> None:
        if isinstance(begin, int):
            self.begin.fill_(begin)
        else:
            self.begin.copy_(begin)


def _static_pass(
    inputs: Tensor,
    begin: Tensor,
    runner: Runner,
    work: Pass,
    stored: tuple[list[Tensor | None], list[Tensor | None]],
    tables: Tables,
    row: Tensor,
    ahead: Tensor,
) -> Forward:
    """A pass over chains that begin at `begin` [batch, 1], all shapes fixed."""
    position = begin + ahead  # [batch, rows]
    key = tables.position  # [1, extent]
    cache: Any = _Stored(*stored)
    view = SlotView(cache, row, position, key.shape[1])
    context = Scattered(view, tables, position, key[:, None] <= position[..., None], key)
    start, stop, head, needs = work
    return Runner.forward(runner, inputs, start, stop, context, head=head, needs=needs)


def recorded(run: Callable[[], Forward]) -> Callable[[], Forward]:
    """A CUDA graph of `run`; each call of it overwrites what the one before returned."""
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
