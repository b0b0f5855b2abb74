"""A frozen language model with an EAGLE-3 head in training: training-time test (arXiv 2503.01840, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from layerskip_model.chunked_loss import Piece, Soft, sum_of_pieces
from layerskip_model.eagle import unrolled
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.eagle_model import DraftTerms, FrozenTarget, measure_chain
from layerskip_model.head_map import HeadMap, chunk_rows, chunks, matmul_dtype, wide_logits
from layerskip_model.head_terms import TOP
from layerskip_model.medusa import labels_ahead
from layerskip_model.token_loss import IGNORE_INDEX, first_choices, top_predictions


class Eagle3Model(FrozenTarget[Eagle3Head]):
    """Trains a head on the `steps` tokens in a row that it will draft, each step on what it made in the one before."""

    def __init__(self, model: PreTrainedModel, head: Eagle3Head, *, steps: int = 7) -> None:
        super().__init__(model, head)
        self.steps = steps

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        weights: Sequence[float],
        position_ids: Tensor | None = None,
        *,
        features: Tensor | None = None,
    ) -> DraftTerms:
        """The terms of one micro-batch: sum_s w_s CE(target, draft in step s).

        In step s the place t, of token x_{t+s+1}, says something about x_{t+s+2}; it counts where x_{t+s+2} does, all
        belong to one document, and the target's own first choice there is in the head's vocabulary. The target's
        distribution is restricted to that and renormalised.

        Args:
            input_ids, labels, position_ids: [batch, seq] as for `labels_ahead`.
            weights: [steps]; 0.8^s in the paper, each over the places of the whole batch.
            features: [batch, seq, 4 * hidden], the inputs of the head's three layers and the model's final states side
                by side, where they are known already.
        """
        with torch.no_grad():
            *read, final = self.states(input_ids, position_ids) if features is None else features.chunk(4, -1)
            final = final.to(self.model.dtype)  # [batch, seq, hidden]
            embedded = self.backbone.embed(input_ids[:, 1:])
        ahead = labels_ahead(labels, self.steps, position_ids)  # [steps + 1, batch, seq]
        entering = self.head.features([state[:, :-1] for state in read])
        positions = None if position_ids is None else position_ids[:, :-1]
        outputs = list(unrolled(self.head, embedded, entering, positions, self.steps))
        total, losses, counts = self._losses(outputs, weights, final, ahead)
        if self.training:
            return DraftTerms(total, losses, counts)
        measures = measure_chain(self.backbone, final, ahead, self._predict, outputs)
        return DraftTerms(total, losses, counts, measures)

    def states(self, input_ids: Tensor, position_ids: Tensor | None) -> list[Tensor]:
        """The inputs of the head's three layers, and the final states, each [batch, seq, hidden]."""
        found: list[Tensor] = []
        hooks = [
            self.backbone.layers[layer].register_forward_pre_hook(lambda _, args: found.append(args[0]))
            for layer in self.head.reads
        ]
        try:
            final = self.backbone.final_states(input_ids, position_ids)
        finally:
            for hook in hooks:
                hook.remove()
        return [*found, final]

    def entering(self, input_ids: Tensor) -> Tensor:
        """Those of the three layers, fused."""
        return self.head.features(self.states(input_ids, None)[:3])

    def _losses(
        self, outputs: list[Tensor], weights: Sequence[float], final: Tensor, ahead: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """The weighted sum, each step's loss and its count; `outputs` of each step, [batch, seq - 1, hidden]."""
        batch, seq = final.shape[:2]
        place = torch.arange(batch * seq, device=final.device).view(batch, seq)[:, :-1].flatten()

        def compute(states: tuple[Tensor, ...], target: HeadMap) -> tuple[Tensor, list[Tensor], Tensor]:
            teacher, *own = states
            rows = [(labels != IGNORE_INDEX).flatten().nonzero().squeeze(1) for labels in ahead[1:, :, :-1]]
            judges = [place[each] + step + 1 for step, each in enumerate(rows)]
            asked = judges[0]  # those of later steps are among them
            if not self.head.vocabulary.is_whole:
                asked = asked[self.head.t2d[first_choices(teacher[asked], target)]]
            number = torch.full((batch * seq,), -1, device=place.device)
            number[asked] = torch.arange(len(asked), device=place.device)
            numbers = [number[each] for each in judges]
            judged = [(each[own >= 0], own[own >= 0]) for each, own in zip(rows, numbers, strict=True)]
            said = self.head.vocabulary.restrict(target).to(matmul_dtype(teacher))
            total, losses = self.head.projection(
                tuple(self._normed(own)),
                lambda normed, head: sum_of_pieces(
                    normed, weights, head, _pieces(teacher[asked], said, judged)
                ),
            )
            counts = torch.tensor([len(each) for each, _ in judged], device=teacher.device)
            return total, losses, counts

        return self.backbone.at_head(
            (final.flatten(0, 1), *(output.flatten(0, 1) for output in outputs)), compute
        )

    def _normed(self, outputs: list[Tensor]) -> Iterator[Tensor]:
        """What the head's LM head reads. What a norm saves is several times its input; doing it again is cheap."""
        for output in outputs:
            yield checkpoint(self.head.norm, output, use_reentrant=False, preserve_rng_state=False)

    def _predict(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of labels that are in the vocabulary, 0 of others; and the choices as the target's tokens."""
        draft = self.head.vocabulary.from_target(labels)
        nll, best = self.head.projection(
            self.head.norm(output), lambda states, head: top_predictions(states, draft, head, TOP)
        )
        return nll, self.head.vocabulary.to_target(best)


def _pieces(asked: Tensor, head: HeadMap, judged: list[tuple[Tensor, Tensor]]) -> Iterator[Piece]:
    """What the target says at its states `asked` [n, hidden], once for all steps; a chunk of it at a time.

    `judged` are each step's rows and, for each of these, which of the n judges it, in order.
    """
    size = chunk_rows(head)
    ends = torch.arange(size, len(asked) + size, size, device=asked.device)
    bounds = torch.stack([torch.searchsorted(numbers, ends) for _, numbers in judged]).tolist()
    for index, chunk in enumerate(chunks(len(asked), head)):
        said = Soft.of(wide_logits(asked[chunk], head), less_entropy=False)
        for step, (rows, numbers) in enumerate(judged):
            own = slice(bounds[step][index - 1] if index else 0, bounds[step][index])
            yield step, rows[own], Soft(said.q[numbers[own] - chunk.start])
