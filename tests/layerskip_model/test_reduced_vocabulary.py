"""The reduced vocabulary of EAGLE-3: what is chosen, the two tables, what is refused."""

from __future__ import annotations

import pytest
import torch

from layerskip_model.errors import UserError
from layerskip_model.head_map import HeadMap
from layerskip_model.reduced_vocabulary import ReducedVocabulary, count_tokens
from layerskip_model.token_loss import IGNORE_INDEX

COUNTS = torch.tensor([0, 5, 2, 2, 9, 2, 0, 1])


def test_the_most_frequent_are_kept_in_the_targets_order() -> None:
    """Of equally frequent ones the lowest."""
    made = ReducedVocabulary.most_frequent(COUNTS, 4)
    assert made.tokens().tolist() == [1, 2, 3, 4]
    made = ReducedVocabulary.most_frequent(COUNTS, 3)
    assert made.tokens().tolist() == [1, 2, 4]
    assert (made.d2t.tolist(), made.d2t.dtype) == ([1, 1, 2], torch.int64)
    assert made.t2d.tolist() == [False, True, True, False, True, False, False, False]
    assert (made.t2d.dtype, made.size, made.is_whole) == (torch.bool, 3, False)
    assert ReducedVocabulary.most_frequent(COUNTS, 7).tokens().tolist() == [0, 1, 2, 3, 4, 5, 7]


def test_all_tokens_are_the_whole_vocabulary() -> None:
    for made in (ReducedVocabulary.most_frequent(COUNTS, 8), ReducedVocabulary.whole(8)):
        assert made.is_whole
        assert not made.d2t.any()
        assert made.t2d.all()


def test_ids_go_there_and_back() -> None:
    made = ReducedVocabulary.most_frequent(COUNTS, 3)
    assert made.to_target(torch.tensor([[0, 1], [2, 2]])).tolist() == [[1, 2], [4, 4]]
    back = made.from_target(torch.tensor([[1, 2, 4], [0, 7, IGNORE_INDEX]]))
    assert back.tolist() == [[0, 1, 2], [IGNORE_INDEX] * 3]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_restricted_head_says_the_renormalised_distribution(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, hidden = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (8, 6))
    bias = torch.randn(8, generator=generator, dtype=torch.float64)
    head = HeadMap(weight, bias, scale=2.0, softcap=softcap)
    made = ReducedVocabulary.most_frequent(COUNTS, 3)
    whole = head.logits(hidden).softmax(-1)[:, made.t2d]
    expected = whole / whole.sum(-1, keepdim=True)
    torch.testing.assert_close(made.restrict(head).logits(hidden).softmax(-1), expected)
    assert ReducedVocabulary.whole(8).restrict(head) is head


def test_tokens_are_counted_where_they_count() -> None:
    labels = [torch.tensor([[1, 1, IGNORE_INDEX], [3, 0, 1]]), torch.tensor([3, IGNORE_INDEX])]
    assert count_tokens(labels, 5).tolist() == [1, 3, 0, 2, 0]


@pytest.mark.parametrize("size", [0, -1, 9])
def test_a_size_that_there_is_not_is_refused(size: int) -> None:
    with pytest.raises(UserError) as caught:
        ReducedVocabulary.most_frequent(COUNTS, size)
    assert str(caught.value) == (
        f"draft_vocab_size: {size} tokens can not be chosen of the target's 8; give 1 to 8"
    )


def test_a_vocabulary_that_misses_every_label_is_refused() -> None:
    made = ReducedVocabulary.most_frequent(COUNTS, 3)
    made.require_labels(2.0, 3.0, "a batch")
    made.require_labels(0.0, 0.0, "a batch")  # nothing counts: another check's business
    with pytest.raises(
        UserError, match=r"^draft_vocab_size: none of the 3 labels of a batch is among the 3 tokens"
    ):
        made.require_labels(3.0, 3.0, "a batch")
