"""Tiny EAGLE heads and packed batches that several tests share, all in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.eagle import EagleHead
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.reduced_vocabulary import ReducedVocabulary
from layerskip_model.token_loss import IGNORE_INDEX

READS = (1, 2, 3)  # of tiny models, which have four layers
Head = EagleHead | Eagle3Head


def moved(head: nn.Module) -> nn.Module:
    """In float64, with weights that are no longer those that a head begins with."""
    generator = torch.Generator().manual_seed(3)
    for parameter in head.double().parameters():
        scale = 0.2 if parameter.ndim == 1 else 0.3
        parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return head


def half_of(vocab_size: int = 64) -> ReducedVocabulary:
    """Three of five tokens."""
    counts = torch.tensor([1 if token % 5 in (1, 3, 4) else 0 for token in range(vocab_size)])
    return ReducedVocabulary.most_frequent(counts, int(counts.sum()))


def some_head(
    kind: str, model: PreTrainedModel, *, reduced: bool = False, norm_before_residual: bool = False
) -> Head:
    """`kind`: eagle or eagle3."""
    backbone = Backbone(model)
    made: nn.Module
    if kind == "eagle":
        made = EagleHead(backbone)
    else:
        vocabulary = half_of() if reduced else ReducedVocabulary.whole(64)
        made = Eagle3Head(backbone, vocabulary, READS, norm_before_residual=norm_before_residual)
    head = moved(made)
    assert isinstance(head, EagleHead | Eagle3Head)
    return head


def packed_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels with gaps, positions [3, 9]: two documents, one, and three of which one is a single token."""
    tokens = torch.randint(64, (3, 10), generator=torch.Generator().manual_seed(5))
    labels = tokens[:, 1:].clone()
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [*range(9)], [0, 1, 2, 0, 0, 1, 2, 3, 4]])
    ends = torch.cat((positions[:, 1:] == 0, torch.zeros(3, 1, dtype=torch.bool)), dim=1)
    labels[ends] = IGNORE_INDEX
    labels[1, 3:5] = IGNORE_INDEX
    return tokens[:, :-1], labels, positions
