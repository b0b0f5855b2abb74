"""The tokens that an EAGLE-3 head can say: the N most frequent ones of the answers (arXiv 2503.01840)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from layerskip_model.errors import UserError
from layerskip_model.head_map import HeadMap
from layerskip_model.token_loss import IGNORE_INDEX


@dataclass(frozen=True)
class ReducedVocabulary:
    """Which N of the target's V tokens are the draft's, in the two tables that checkpoints hold.

    Attributes:
        d2t: int64 [N]; the draft's token d is the target's d + d2t[d].
        t2d: bool [V], True for the target's tokens that are among them.
    """

    d2t: Tensor
    t2d: Tensor

    @classmethod
    def whole(cls, vocab_size: int) -> Self:
        """All tokens, in their own order."""
        return cls(torch.zeros(vocab_size, dtype=torch.int64), torch.ones(vocab_size, dtype=torch.bool))

    @classmethod
    def most_frequent(cls, counts: Tensor, size: int) -> Self:
        """The `size` tokens with the largest `counts` [V], of equal ones the lowest; in the target's order.

        Raises UserError for a size that V tokens do not have.
        """
        if not 1 <= size <= len(counts):
            raise UserError(
                f"draft_vocab_size: {size} tokens can not be chosen of the target's {len(counts)}; "
                f"give 1 to {len(counts)}"
            )
        order = counts.sort(descending=True, stable=True).indices
        tokens = order[:size].sort().values
        kept = torch.zeros(len(counts), dtype=torch.bool)
        kept[tokens] = True
        return cls(tokens - torch.arange(size), kept)

    @property
    def size(self) -> int:
        """N."""
        return len(self.d2t)

    @property
    def is_whole(self) -> bool:
        """Whether no token is missing."""
        return self.size == len(self.t2d)

    def to_target(self, tokens: Tensor) -> Tensor:
        """The target's ids of the draft's, any shape."""
        return tokens + self.d2t[tokens]

    def from_target(self, tokens: Tensor) -> Tensor:
        """The draft's ids of the target's, any shape; IGNORE_INDEX of those that are not in it and of itself."""
        kept = self.tokens()
        ids = torch.full_like(self.t2d, IGNORE_INDEX, dtype=torch.int64)
        ids[kept] = torch.arange(self.size, device=kept.device)
        is_none = tokens == IGNORE_INDEX
        return ids[tokens.masked_fill(is_none, 0)].masked_fill(is_none, IGNORE_INDEX)

    def tokens(self) -> Tensor:
        """The target's ids of all, [N]."""
        return self.d2t + torch.arange(self.size, device=self.d2t.device)

    def restrict(self, head: HeadMap) -> HeadMap:
        """A target's head whose softmax is the target's distribution over these tokens, renormalised."""
        if self.is_whole:
            return head
        tokens = self.tokens()
        bias = None if head.bias is None else head.bias[tokens]
        return HeadMap(head.weight[tokens], bias, head.scale, head.softcap)

    def require_labels(self, missing: float, counted: float, of: str) -> None:
        """Raise UserError where labels count, and all of them are missing; `of` says whose they are."""
        if missing >= counted > 0:
            raise UserError(
                f"draft_vocab_size: none of the {counted:,.0f} labels of {of} is among the {self.size:,} tokens of the "
                "reduced vocabulary; keep more, and count the tokens of the answers that are trained on"
            )


def count_tokens(labels: Iterable[Tensor], vocab_size: int) -> Tensor:
    """How often each token is a label, int64 [vocab_size]; labels of any shape, without those that do not count."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for part in labels:
        counts += torch.bincount(part[part != IGNORE_INDEX].flatten(), minlength=vocab_size)
    return counts
