"""What an EAGLE head would say if it were told a text in another way: right, or with one of the usual mistakes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eval.decoding.cache import Cache, SpanView
from eval.decoding.drafters.eagle import EagleDraft, HeadLayer
from layerskip_model.backbone import Backbone
from layerskip_model.draft_layer import DraftLayer
from layerskip_model.eagle import unrolled
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.head_probe import Head
from layerskip_model.rope import Rope, plain_rope, rope_of
from layerskip_model.runner import Runner

BASES = (0.01, 0.02, 0.1, 10.0, 50.0, 100.0)  # models have 10 thousand, 500 thousand and a million


@dataclass(frozen=True)
class Reading:
    """How a head is told a text.

    Attributes:
        name: to go on from "with ...".
        layers: the target's layers whose outgoing states are its features.
        shift: how many places later a feature is from than it should.
        normed: whether an EAGLE head's are those after the final norm.
        base: what the target's RoPE base is multiplied by in its own layers.
        rope: how the head turns positions, None for as it does.
    """

    name: str
    layers: tuple[int, ...]
    shift: int = 0
    normed: bool = True
    base: float = 1.0
    rope: Rope | None = None


class HeadReader:
    """A head of a target, and that target's states, told in any way."""

    def __init__(self, draft: EagleDraft, runner: Runner) -> None:
        self.head: Head = draft.heads
        self.runner = runner
        self._layer = HeadLayer(draft, runner)
        self.right = Reading("nothing changed", self._layer.needs)
        self._kept: tuple[Tensor, float, dict[int, Tensor]] | None = None

    def mistakes(self) -> list[Reading]:
        """The usual ones, those that the target itself makes last. What undoes a mistake is one, too."""
        right = self.right
        number = len(right.layers)
        every = [
            (1,) * number,
            *(tuple(int(one == place) for one in range(number)) for place in range(number)),
        ]
        found = []
        for moved in dict.fromkeys(every):
            for by in (-1, 1):
                layers = tuple(layer + by * one for layer, one in zip(right.layers, moved, strict=True))
                if all(0 <= layer < self.runner.num_layers for layer in layers):
                    found.append(replace(right, name=_spoken(self.head, layers), layers=layers))
        found += [
            replace(right, name="features from one place later", shift=1),
            replace(right, name="features from one place before", shift=-1),
        ]
        if not isinstance(self.head, Eagle3Head):
            found.append(replace(right, name="features from before the final norm", normed=False))
        return found + self._other_ropes()

    def _other_ropes(self) -> list[Reading]:
        """The head's, then those of the target, which the head has too unless it has its own."""
        backbone, layer = self.runner.backbone, self.head.layer
        of_model = rope_of(backbone.config.to_dict(), layer.kind)
        own = of_model if layer.rope is None else layer.rope.parameters
        others = {"the model's RoPE in the head": of_model, "RoPE of base 10000 in the head": plain_rope(own)}
        times = {f"the head's RoPE base times {by:g}": _multiplied(own, by) for by in BASES}
        found = [
            replace(self.right, name=name, rope=Rope(backbone, other))
            for name, other in (others | times).items()
            if other != own
        ]
        for by in BASES:
            with_model = None if layer.rope is not None else Rope(backbone, _multiplied(own, by))
            name = f"the model's RoPE base times {by:g}"
            found.append(replace(self.right, name=name, base=by, rope=with_model))
        return found

    def told(self, reading: Reading, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the tokens one after each place of `tokens` [seq], and its features, [1, seq - 1, hidden]."""
        states = self._states(tokens, reading.base)
        if reading.normed:
            needs = zip(self._layer.needs, reading.layers, strict=True)
            features = self._layer.features({need: states[layer] for need, layer in needs})
        else:
            features = states[reading.layers[0]]
        features = features.roll(-reading.shift, dims=1)  # at the end of the text it is any other
        return self.runner.embed(tokens[None, 1:]), features[:, :-1]

    def choices(self, reading: Reading, tokens: Tensor, steps: int) -> Iterator[Tensor]:
        """The head's first choice in each step s at each place t, of the token t + s + 2 of `tokens` [seq].

        Each is told the text's own tokens before it. Yields the target's ids, int64 [seq - 2 - s].
        """
        embedded, features = self.told(reading, tokens)
        with turning(self.head.layer, reading.rope):
            for step, output in enumerate(unrolled(self.head, embedded, features, None, steps)):
                best = self.head.logits(output[0, : max(0, len(tokens) - 2 - step)]).argmax(dim=-1)
                yield self.head.vocabulary.to_target(best) if isinstance(self.head, Eagle3Head) else best

    def _states(self, tokens: Tensor, base: float) -> dict[int, Tensor]:
        """What leaves each of the target's layers, [1, seq, hidden]; the last ones are kept."""
        if self._kept is None or self._kept[1] != base or not torch.equal(self._kept[0], tokens):
            runner, length = self.runner, len(tokens)
            view = SpanView(Cache(1, runner.num_layers, length), 0, length)
            every = tuple(range(runner.num_layers))
            with turned(runner.backbone, base):
                context = runner.span(view, runner.tables(length, length), 0, length)
                embedded = runner.embed(tokens[None])
                states = runner.run_reading(embedded, 0, runner.num_layers, context, every)[1]
            self._kept = tokens, base, states
        return self._kept[2]


def _spoken(head: Head, layers: tuple[int, ...]) -> str:
    """As config.json has them: of EAGLE-3 the layers that states enter."""
    if isinstance(head, Eagle3Head):
        return f"the feature layers {[layer + 1 for layer in layers]}"
    return f"the features of layer {layers[0]}, counted from 0"


def _multiplied(parameters: dict[str, Any], by: float) -> dict[str, Any]:
    return parameters | {"rope_theta": parameters["rope_theta"] * by}


@contextmanager
def turning(layer: DraftLayer, rope: Rope | None) -> Iterator[None]:
    """The layer turns positions so meanwhile; None: as it does."""
    before = layer.rope
    layer.rope = before if rope is None else rope
    try:
        yield
    finally:
        layer.rope = before


@contextmanager
def turned(backbone: Backbone, times: float) -> Iterator[None]:
    """Whoever asks for the model's rotary tables gets them of another base meanwhile."""
    if times == 1.0:
        yield
        return
    before: Any = backbone.base.rotary_emb
    config = copy.deepcopy(backbone.config)
    _multiply(config.rope_parameters, times)
    backbone.base.rotary_emb = type(before)(config).to(next(before.buffers()).device)
    try:
        yield
    finally:
        backbone.base.rotary_emb = before


def _multiply(parameters: dict[str, Any], times: float) -> None:
    """Every RoPE base in there: some models have one for each kind of attention."""
    for name, value in parameters.items():
        if isinstance(value, dict):
            _multiply(value, times)
        elif name == "rope_theta":
            parameters[name] = value * times
