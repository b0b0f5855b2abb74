"""Accepted drafts on given text, by a loop over its places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerskip_model.agreement import accepted_drafts


def by_a_loop(agreed: Tensor, counted: Tensor, drafts: int, positions: Tensor | None) -> tuple[int, int]:
    total = count = 0
    for row in range(agreed.shape[0]):
        for begin in range(agreed.shape[1] - drafts + 1):
            places = range(begin, begin + drafts)
            one_document = positions is None or all(
                int(positions[row, place]) == int(positions[row, begin]) + place - begin for place in places
            )
            if not one_document or not all(counted[row, place] for place in places):
                continue
            count += 1
            for place in places:
                if not agreed[row, place]:
                    break
                total += 1
    return total, count


@pytest.mark.parametrize("drafts", [1, 2, 4, 11, 12])
@pytest.mark.parametrize("with_documents", [False, True])
def test_runs_end_at_documents_and_at_what_is_not_predicted(drafts: int, with_documents: bool) -> None:
    generator = torch.Generator().manual_seed(drafts)
    agreed = torch.rand(5, 11, generator=generator) < 0.7
    counted = torch.rand(5, 11, generator=generator) < 0.95
    counted[0] = True
    positions = None
    if with_documents:
        positions = torch.arange(11).repeat(5, 1)
        positions[1:3, 4:] -= 4
        positions[2, 9:] -= 5
        positions[3, 1:] = torch.arange(10)
    total, count = accepted_drafts(agreed, counted, drafts, positions)
    expected = by_a_loop(agreed, counted, drafts, positions)
    assert (int(total), int(count)) == expected
    assert (count == 0) == (drafts == 12)


def test_streaks_are_seen() -> None:
    """Half of the tokens agree either way; in one streak, four drafts are worth twice as much."""
    counted = torch.ones(1, 64, dtype=torch.bool)
    streak = torch.arange(64)[None] < 32
    turns = torch.arange(64)[None] % 2 == 0
    in_a_streak, by_turns = (
        float(t) / float(n) for t, n in (accepted_drafts(x, counted, 4) for x in (streak, turns))
    )
    assert in_a_streak > 1.9
    assert by_turns == pytest.approx(0.5, abs=0.02)


def test_one_draft_is_the_agreement() -> None:
    agreed = torch.tensor([[True, False, True]])
    counted = torch.tensor([[True, True, False]])
    assert [int(x) for x in accepted_drafts(agreed, counted, 1)] == [1, 2]
