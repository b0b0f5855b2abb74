"""The early-exit loss and its curricula (arXiv 2404.16710, section 4.2), as one module.

Layers are numbered l = 0..L-1 as in the paper's equations. An exit is named by E = l + 1, the number of layers
that run before it, as everywhere else in this project; E = L is the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone, LayerCall, model_device
from layerskip_model.errors import UserError
from layerskip_model.head_map import HeadMap
from layerskip_model.layer_dropout import LayerDropout, run_kept_rows
from layerskip_model.token_loss import IGNORE_INDEX, predictions, weighted_cross_entropy

WEIGHTS: dict[str, Callable[[int], float]] = {
    "uniform": lambda layer: 1.0,
    "linear": lambda layer: layer + 1.0,
    "sqrt": lambda layer: math.sqrt(layer + 1.0),
    "inverse": lambda layer: 1.0 / (layer + 1.0),
    "inverse_sqrt": lambda layer: 1.0 / math.sqrt(layer + 1.0),
}
"""Weights of an exit by its layer l, for use instead of the paper's ("sum")."""


@dataclass(frozen=True)
class ExitLoss:
    """The weights e~(t, l) of the early-exit loss: a pure function of the optimizer step.

    Attributes:
        num_layers, total_steps: L and T.
        exits: the exits E that may have a loss of their own; the last layer always has one.
        weights: "sum" (the paper's e(l)), a name in WEIGHTS, or one number an exit: its share of the whole
            loss while every exit is on, the last layer getting the rest.
        e_scale: 0..1, used by "sum".
        curriculum: "rotational", "gradual" or "none".
        every: R of the rotational curriculum.
    """

    num_layers: int
    total_steps: int
    exits: Sequence[int]
    weights: str | Sequence[float]
    e_scale: float
    curriculum: str
    every: int

    def scale(self, layer: int) -> float:
        """e(l), before normalisation."""
        last = self.num_layers - 1
        if not isinstance(self.weights, str):
            if layer == last:
                return 1.0 - sum(self.weights)
            return self.weights[list(self.exits).index(layer + 1)]
        if self.weights == "sum":
            if layer == last:
                return last + self.e_scale * (last - 1) * last / 2
            return self.e_scale * layer * (layer + 1) / 2
        return WEIGHTS[self.weights](layer)

    def is_on(self, layer: int, step: int) -> bool:
        """C(t, l)."""
        last = self.num_layers - 1
        if layer == last:
            return True
        if layer + 1 not in self.exits:
            return False
        if self.curriculum == "rotational":
            return (layer - step) % self.every == 0
        if self.curriculum == "gradual":
            return step >= (last - layer) * self.total_steps / (2 * self.num_layers)
        return True

    def at(self, step: int) -> dict[int, float]:
        """e~(t, l) by exit E, normalised to sum to one; exits whose weight is zero are left out."""
        if self.num_layers == 1:
            return {1: 1.0}  # where the paper's e(0) is zero, as for every first layer
        raw = {layer + 1: self.scale(layer) for layer in range(self.num_layers) if self.is_on(layer, step)}
        total = sum(raw.values())
        return {exit_layer: weight / total for exit_layer, weight in raw.items() if weight > 0.0}


@dataclass
class LossTerms:
    """What one forward leaves: per exit E the summed cross entropy, without gradient, and its weight e~(t, l).

    In evaluation instead of the weights the number of tokens that count, and of those with the right top-1
    prediction and with the last layer's.
    """

    cross_entropy: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, float] = field(default_factory=dict)
    correct: dict[int, Tensor] = field(default_factory=dict)
    agreement: dict[int, Tensor] = field(default_factory=dict)
    agreed: dict[int, Tensor] = field(default_factory=dict)  # bool [batch, seq], of all tokens
    tokens: Tensor | None = None
    total: Tensor | None = None

    def weighted_sum(self) -> Tensor:
        """J(t) times the number of tokens: sum_l e~(t, l) CE_l, with its gradient."""
        assert self.total is not None, "in training only"
        return self.total


class EarlyExitModel(nn.Module):
    """A language model trained to exit early: layer dropout inside, one shared LM head at every exit.

    In training mode `forward` drops layers and computes the exits that the curriculum has on; in evaluation
    mode nothing is dropped and every exit is measured. The model itself stays a plain transformers model.
    """

    def __init__(self, model: PreTrainedModel, exit_loss: ExitLoss, dropout: LayerDropout | None) -> None:
        super().__init__()
        self.model = model
        self.exit_loss = exit_loss
        self.dropout = dropout
        self.backbone = Backbone(model)
        _require_fitting(self.backbone, exit_loss, dropout)
        self._running = False  # inside forward
        self._keep: np.ndarray | None = None  # [layers, batch], of the last forward: its backward may need it
        self._wanted: frozenset[int] = frozenset()
        self._states: dict[int, Tensor] = {}  # exit E -> [batch, seq, hidden]
        self.backbone.intercept_layers(self._run_layer)

    def _run_layer(self, index: int, call: LayerCall, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Layer `index`, on the kept samples where this module's own forward (or its recomputation) asks."""
        if self._keep is not None and (self._running or _in_backward()):
            hidden = run_kept_rows(call, self._keep[index], hidden, *args, **kwargs)
        else:
            hidden = call(hidden, *args, **kwargs)
        if index + 1 in self._wanted:
            self._states[index + 1] = hidden
        return hidden

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        rows: Sequence[int],
        step: int,
        position_ids: Tensor | None = None,
    ) -> LossTerms:
        """The loss terms of one micro-batch.

        `input_ids`, `labels` [batch, seq], labels already shifted, IGNORE_INDEX where there is none; `rows`
        the samples' indexes in the global batch; `step` the optimizer step; `position_ids` [batch, seq] restart
        at 0 with each document of a row, which then attends to itself only. With layer dropout and activation
        checkpointing, run the backward of one forward before the next forward.
        """
        last = self.backbone.num_layers
        weights = self.exit_loss.at(step) if self.training else dict.fromkeys(range(1, last + 1), 0.0)
        self._keep = self.dropout.kept(step, rows) if self.training and self.dropout else None
        self._wanted = frozenset(weights) - {last}
        self._running = True
        try:
            final = self.backbone.final_states(input_ids, position_ids)  # [batch, seq, hidden]
            states = self._states | {last: final}
        finally:
            self._running, self._wanted, self._states = False, frozenset(), {}
        if self.training:
            return self._losses(states, labels, weights)
        return self._measurements(states, labels)

    def _normed(self, state: Tensor, exit_layer: int) -> Tensor:
        """g without its head: [batch, seq, hidden] -> [batch * seq, hidden]. The model has normed the last itself.

        What a norm saves for its backward is several times its input; doing it again is cheap.
        """
        if exit_layer < self.backbone.num_layers:
            state = checkpoint(self.backbone.norm, state, use_reentrant=False, preserve_rng_state=False)
        return state.flatten(0, 1)

    def _losses(self, states: dict[int, Tensor], labels: Tensor, weights: dict[int, float]) -> LossTerms:
        exits = sorted(states)

        def compute(hidden: tuple[Tensor, ...], head: HeadMap) -> tuple[Tensor, list[Tensor]]:
            normed = (self._normed(state, e) for state, e in zip(hidden, exits, strict=True))
            return weighted_cross_entropy(normed, [weights[e] for e in exits], labels.flatten(), head)

        # One call, so that an engine that shards the head gathers it once.
        total, losses = self.backbone.at_head(tuple(states[e] for e in exits), compute)
        return LossTerms(dict(zip(exits, losses, strict=True)), weights, total=total)

    def _measurements(self, states: dict[int, Tensor], labels: Tensor) -> LossTerms:
        flat = labels.flatten().to(model_device(self.backbone.head))
        counted = flat != IGNORE_INDEX
        terms = LossTerms(tokens=counted.sum())
        final: Tensor | None = None
        for exit_layer in sorted(states, reverse=True):
            nll, top = self.backbone.at_head(
                self._normed(states[exit_layer], exit_layer),
                lambda hidden, head: predictions(hidden, flat, head),
            )
            final = top if final is None else final
            terms.cross_entropy[exit_layer] = nll.sum()
            terms.correct[exit_layer] = ((top == flat) & counted).sum()
            terms.agreed[exit_layer] = (top == final).view(labels.shape)
            terms.agreement[exit_layer] = ((top == final) & counted).sum()
        return terms


def _require_fitting(backbone: Backbone, exit_loss: ExitLoss, dropout: LayerDropout | None) -> None:
    """Refuse what would train something else than it says."""
    for part in (exit_loss, dropout):
        if part is not None and part.num_layers != backbone.num_layers:
            raise ValueError(f"{part} is not for a model of {backbone.num_layers} layers")
    if dropout is not None and backbone.config._attn_implementation == "flex_attention":
        raise UserError(
            "attn_implementation='flex_attention' makes one mask for the whole batch, from which layer dropout "
            "cannot take samples out; use 'sdpa', 'eager' or 'flash_attention_2'"
        )
    backbone.check()


def _in_backward() -> bool:
    """Whether autograd is running: a layer called then is one that activation checkpointing recomputes."""
    return torch._C._current_graph_task_id() != -1
