"""Which prompts are decoded together."""

from __future__ import annotations

import pytest

from eval.prompts import Prompt, make_batches
from eval.target import Target
from layerskip_model.errors import UserError


def some(*lengths: int) -> list[Prompt]:
    return [Prompt(i, f"file:{i}", [5] * length) for i, length in enumerate(lengths)]


def test_neighbours_are_a_batch_and_streams_are_indices(tiny_target: Target) -> None:
    batches, unfit = make_batches(tiny_target, some(3, 4, 5, 6, 7), 2)
    assert [batch.number for batch in batches] == [0, 1, 2]
    assert [batch.streams for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [[len(tokens) for tokens in batch.tokens] for batch in batches] == [[3, 4], [5, 6], [7]]
    assert unfit == {}


def test_a_prompt_that_cannot_be_decoded_takes_nobodys_place(tiny_target: Target) -> None:
    batches, unfit = make_batches(tiny_target, some(3, 128, 5, 0, 7, 8), 2)
    assert [batch.streams for batch in batches] == [[0, 2], [4, 5]]
    assert sorted(unfit) == [1, 3]
    assert "the model's context is 128" in str(unfit[1])
    assert "prompt 3 is empty" in str(unfit[3])


def test_a_batch_larger_than_the_prompts_is_refused(tiny_target: Target) -> None:
    assert len(make_batches(tiny_target, some(3, 4), 2)[0]) == 1
    with pytest.raises(UserError, match="--batch_size 3: there are only 2 prompts; give 2 or less"):
        make_batches(tiny_target, some(3, 4), 3)
