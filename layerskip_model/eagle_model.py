"""A frozen language model with an EAGLE head in training (arXiv 2401.15077, section 4.2)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.eagle import EagleHead, unrolled
from layerskip_model.head_terms import TOP, HeadMeasures, measure
from layerskip_model.medusa import labels_ahead
from layerskip_model.token_loss import IGNORE_INDEX, soft_cross_entropy_sum, top_predictions

Head = TypeVar("Head", bound=nn.Module)
Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DraftTerms:
    """What a forward leaves. Sums over the places that count.

    Attributes:
        total: the weighted sum of all terms, with its gradient in training.
        losses: each term, without gradient. EAGLE: regression and cross entropy; EAGLE-3: each step's cross entropy.
        counts: places that count in each.
        measures: in evaluation, of the chain of first choices; step s is its head s + 1. EAGLE-3's losses there are of
            labels that are in its vocabulary, and 0 of others.
    """

    total: Tensor
    losses: list[Tensor]
    counts: Tensor
    measures: HeadMeasures | None = None


class FrozenTarget(nn.Module, Generic[Head]):
    """A frozen language model, always in evaluation mode, and a head that trains on its states."""

    def __init__(self, model: PreTrainedModel, head: Head) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.backbone = Backbone(model)
        self.backbone.check()
        self.head = head

    def train(self, mode: bool = True) -> Self:
        """As usual; the language model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    @abstractmethod
    def entering(self, input_ids: Tensor) -> Tensor:
        """The features that enter the head, of whole texts, tokens [batch, seq] -> [batch, seq, hidden]."""


class EagleModel(FrozenTarget[EagleHead]):
    """Trains a head by regression to the target's features, and by cross entropy to what the target says.

    Attributes:
        noise: the features that enter the head in training are off by up to so much, uniformly.
        steps: how many tokens are drafted in a row in evaluation.
    """

    def __init__(
        self, model: PreTrainedModel, head: EagleHead, *, noise: float = 0.1, steps: int = 5
    ) -> None:
        super().__init__(model, head)
        self.noise = noise
        self.steps = steps

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        weights: tuple[float, float],
        position_ids: Tensor | None = None,
        *,
        features: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> DraftTerms:
        """The terms of one micro-batch: w_reg SmoothL1(f^, f) + w_ce CE(softmax(head(f)), head(f^)).

        The place t, of feature f_t and token x_{t+1}, makes a guess at f_{t+1} and what that says about x_{t+2}; it
        counts where x_{t+2} does and all belong to one document. The regression is a mean over the hidden size.

        Args:
            input_ids, labels, position_ids: [batch, seq] as for `labels_ahead`.
            weights: of regression and cross entropy; 1 and 0.1 in the paper, each over the places of the whole batch.
            features: [batch, seq, hidden], the model's final states where they are known already.
            generators: of each row's noise, on the features' device; None: torch's own.
        """
        with torch.no_grad():
            if features is None:
                features = self.backbone.final_states(input_ids, position_ids)
            states = features.to(self.model.dtype)  # [batch, seq, hidden]
            embedded = self.backbone.embed(input_ids[:, 1:])
        entering = states[:, :-1].to(self.head.fc.weight.dtype)
        if self.training and self.noise:
            entering = entering + noise_like(entering, self.noise, generators)
        ahead = labels_ahead(labels, 1 if self.training else self.steps, position_ids)
        positions = None if position_ids is None else position_ids[:, :-1]
        outputs = unrolled(self.head, embedded, entering, positions, len(ahead) - 1)
        first = next(outputs)
        mask = (ahead[1, :, :-1] != IGNORE_INDEX).flatten()
        rows = mask.nonzero().squeeze(1)
        guess, target = first.flatten(0, 1), states[:, 1:].flatten(0, 1)
        differences = F.smooth_l1_loss(
            guess.index_select(0, rows), target.index_select(0, rows).to(guess.dtype), reduction="none"
        )
        regression = differences.mean(-1).sum()
        cross_entropy = self.backbone.at_head(
            (guess, target), lambda both, head: soft_cross_entropy_sum(both[0], both[1], head, head, mask)
        )
        total = weights[0] * regression + weights[1] * cross_entropy
        losses = [regression.detach(), cross_entropy.detach()]
        counts = mask.sum().expand(2)
        if self.training:
            return DraftTerms(total, losses, counts)
        measures = measure_chain(self.backbone, states, ahead, self._predict, [first, *outputs])
        return DraftTerms(total, losses, counts, measures)

    def entering(self, input_ids: Tensor) -> Tensor:
        """The model's final states, without noise."""
        return self.backbone.final_states(input_ids)

    def _predict(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.backbone.at_head(output, lambda states, head: top_predictions(states, labels, head, TOP))


def noise_like(states: Tensor, size: float, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Uniform in +-size, [batch, seq, hidden]; a row with a generator has its own, whatever rows are beside it."""
    noise = torch.empty_like(states)
    if generators is None:
        return noise.uniform_(-size, size)
    for row, generator in zip(noise, generators, strict=True):
        row.uniform_(-size, size, generator=generator)
    return noise


def measure_chain(
    backbone: Backbone, states: Tensor, ahead: Tensor, predict: Predict, outputs: Iterable[Tensor]
) -> HeadMeasures:
    """`measure` of a head's chain of first choices: what left its layer in step s is head s + 1.

    `states` [batch, seq, hidden] final ones; `ahead` [steps + 1, batch, seq] as `labels_ahead` gives it; `outputs` for
    each step [batch, seq - 1, hidden]; `predict(output, labels)` as `top_predictions`, the first TOP, flat.
    """
    made = [F.pad(output, (0, 0, 0, 1)).flatten(0, 1) for output in outputs]
    return measure(backbone, states, ahead.flatten(1), lambda index, labels: predict(made[index], labels))
