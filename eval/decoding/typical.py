"""Typical acceptance: drafts that are likely enough are kept. It does not keep the target's distribution.

Medusa, arXiv 2401.10774, section 3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eval.decoding.acceptance import Outcome, longest_path
from eval.decoding.sampling import Drawing, check_possible
from eval.decoding.shaping import Shaping
from eval.decoding.tree import Draft

if TYPE_CHECKING:
    from eval.decoding.drafters.base import State

THRESHOLD = 0.09
ALPHA = 0.3  # the square root of the threshold
"""Medusa's own."""


class Typical(Drawing):
    """Keeps a draft x where p(x) > min(threshold, alpha * exp(-H(p))), with the target's p after its parent.

    So where the target hesitates (H, the entropy of p, is large) less is asked of a draft. Of the paths on which
    all drafts are kept the longest is taken, of several the likeliest, then the first. The target's own token
    after it is drawn from p, by the same noise as plain sampling has for that place.

    Not lossless: texts are not distributed as the target's samples, but lean to what the drafter likes. Without
    drafts, as in autoregressive decoding, it is plain sampling.
    """

    def __init__(self, shaping: Shaping, seed: int, threshold: float, alpha: float) -> None:
        super().__init__(shaping, seed)
        self.threshold = threshold
        self.alpha = alpha

    def draft(self, state: State, logits: Tensor, tokens: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The argmax: what is likely is kept, so the likeliest is the best draft."""
        return self.shaping.after_chain(state, logits, tokens).argmax(dim=-1), None

    def accept(self, state: State, logits: Tensor, draft: Draft) -> Outcome:
        """Accept the longest path of likely drafts and draw the target's own token.

        Raises ValueError for drafts that were drawn; UserError where no token has a probability.
        """
        if draft.q is not None:
            raise ValueError("typical acceptance has no use for drafts that were drawn; q must be None")
        shaped = self.shaped(state, logits, draft)
        p = shaped.softmax(dim=-1)  # [batch, n, vocab], the target's distribution
        own = self.own(state, shaped, draft)  # [batch, n]
        # 1. What each draft has to exceed, and what it has: both after its parent.
        limit = (self.alpha * (-torch.special.entr(p).sum(dim=-1)).exp()).clamp(max=self.threshold)
        parent = draft.parents.clamp(min=0)  # [batch, n]
        row = torch.arange(p.shape[0], device=p.device)[:, None]
        share = p[row, parent, draft.tokens]
        proposed = draft.valid & draft.candidate
        merit = torch.where(proposed & (share > limit.gather(1, parent)), share.log(), -torch.inf)
        # 2. Tell the host: the step's one synchronisation. Whole numbers are exact in float64.
        columns = [draft.tokens, own, draft.parents, proposed, merit]
        host = torch.stack([column.double() for column in columns], dim=1).tolist()
        # 3. Take the longest path.
        outcome = Outcome(draft, [], [], [], logits)
        for tokens, chosen, parents, up, merits in host:
            path = longest_path([one > -torch.inf for one in merits], [int(one) for one in parents], merits)
            outcome.path.append(path)
            outcome.tokens.append([int(tokens[node]) for node in path[1:]] + [int(chosen[path[-1]])])
            outcome.drafted.append(int(sum(up[1:])))
        check_possible(state, outcome)
        return outcome
