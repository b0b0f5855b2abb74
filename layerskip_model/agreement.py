"""How many drafts of an exit the last layer would accept, from where their first choices agree on given text."""

from __future__ import annotations

import torch
from torch import Tensor


def accepted_drafts(
    agreed: Tensor, counted: Tensor, drafts: int, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The expected number of accepted drafts, as (sum, count) over the places where `drafts` tokens follow.

    A place's number is the length of the run of agreeing tokens that starts there, at most `drafts`. Unlike
    powers of the agreement it sees that agreement comes in streaks. A place counts where the next `drafts`
    tokens all count and belong to one document.

    Args:
        agreed: bool [batch, seq], whether the exit's first choice is the last layer's.
        counted: bool [batch, seq], False where nothing is predicted.
        drafts: tokens drafted a round.
        position_ids: int64 [batch, seq]; a document ends where they don't go on by one. None: one document.

    Returns:
        Two int64 scalars; (0, 0) where rows are shorter than `drafts`.
    """
    if agreed.shape[1] < drafts:
        nothing = torch.zeros((), dtype=torch.int64, device=agreed.device)
        return nothing, nothing
    fits = counted.unfold(1, drafts, 1).all(-1)  # [batch, seq - drafts + 1]
    if position_ids is not None and drafts > 1:
        goes_on = position_ids.diff(dim=1) == 1  # [batch, seq - 1]
        fits = fits & goes_on.unfold(1, drafts - 1, 1).all(-1)
    runs = agreed.unfold(1, drafts, 1).to(torch.int64).cumprod(-1).sum(-1)  # [batch, seq - drafts + 1]
    return (runs * fits).sum(), fits.sum()
