"""How likely it is that what an exit drafts is kept, and whether to draft on.

An exit says how likely a token is, not how likely the whole model is to agree. The two are far apart: where a text can
go on in many ways, an exit gives each of them little and the whole model may still choose the same one. Here the
logits of the two are taken to differ by noise. Where a rule takes the likeliest token, and the noise has a Gumbel
distribution of scale s, the exit's logits l agree with probability softmax(l / s). Where tokens are drawn, the
distributions p and q differ by about s times what q leaves to other tokens, and so much of q is rejected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.decoding.drafters.base import State

DISAGREEMENT = 0.35
"""s, measured on exits 2 and 4 of 16: estimates and acceptance agree, for sure drafts as for unsure ones."""


class Confidence:
    """Decides draft by draft which rows draft on: those whose drafts so far are likely to be kept, all of them.

    Sampling stays lossless. A draft is up for acceptance whatever it is; what it is decides only whether another one
    is drafted after it. So whether a place has a draft depends on what comes before it, and given that, its token is
    drawn from the target's distribution either way: by way of a draft, or as the target's own where the chain ended.
    """

    def __init__(self, state: State, drafts: int, threshold: float) -> None:
        self._threshold = threshold
        self._device = state.length.device
        self._made = 0
        self._estimate = [1.0] * state.batch  # that all drafts so far are kept
        self._limit = [
            0 if finished else min(drafts, room - 1)
            for room, finished in zip(state.room, state.finished, strict=True)
        ]

    def goes_on(self, logits: Tensor, token: Tensor, q: Tensor | None) -> bool:
        """Whether any row drafts another token after this one. Waits for the device.

        logits and q (None where it was not drawn) [batch, 1, vocab], token [batch, 1].
        """
        self._made += 1
        given = (logits.float() / DISAGREEMENT).softmax(dim=-1) if q is None else q
        for row, probability in enumerate(given.gather(2, token[..., None]).flatten().tolist()):
            kept = probability if q is None else 1 - DISAGREEMENT * (1 - probability)
            self._estimate[row] *= kept
            if self._estimate[row] < self._threshold:
                self._limit[row] = min(self._limit[row], self._made)
        return max(self._limit) > self._made

    def drafted(self, drafts: int) -> Tensor | None:
        """How many drafts each row has, [batch, 1]; None where all have `drafts`."""
        if all(limit == drafts for limit in self._limit):
            return None
        return torch.tensor(self._limit).to(self._device)[:, None]


def default_threshold(exit_layer: int, num_layers: int) -> float:
    """Where one more draft costs about what it wins.

    It costs exit_layer / num_layers of a step of autoregressive decoding, in which about two tokens would be won,
    and wins one token if it is kept and all before it are.
    """
    return min(0.75, 2 * exit_layer / num_layers)
