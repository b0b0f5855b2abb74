"""The greedy rule against brute force."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eval.decoding.acceptance import Greedy, Outcome, follow, longest_path
from eval.decoding.shaping import Shaping
from eval.decoding.tree import Draft


def all_paths(parents: list[int], node: int = 0) -> list[list[int]]:
    children = [child for child in range(1, len(parents)) if parents[child] == node]
    return [[node]] + [[node, *rest] for child in children for rest in all_paths(parents, child)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_longest_path_is_the_longest_agreeing_one(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 9))
    parents = [-1] + [data.draw(st.integers(-1, node - 1)) for node in range(1, n)]
    tokens = data.draw(st.lists(st.integers(-1, 1), min_size=n, max_size=n))
    choices = data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    agreeing = [
        path for path in all_paths(parents) if all(tokens[b] == choices[a] for a, b in pairwise(path))
    ]
    longest = [path for path in agreeing if len(path) == max(map(len, agreeing))]
    fits = [parent >= 0 and token == choices[parent] for token, parent in zip(tokens, parents, strict=True)]
    assert longest_path(fits, parents) == min(longest, key=lambda path: path[-1])
    merit = data.draw(st.lists(st.integers(-3, 0).map(float), min_size=n, max_size=n))
    best = min(longest, key=lambda path: (-sum(merit[node] for node in path[1:]), path[-1]))
    assert longest_path(fits, parents, merit) == best


def one_hot(choices: list[list[int]]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(choices), 10).double()  # [batch, n, vocab]


def draft_of(tokens: list[list[int]], parents: list[list[int]], **changes: Tensor) -> Draft:
    shape = (len(tokens), len(tokens[0]))
    fields: dict[str, Any] = {
        "tokens": torch.tensor(tokens),
        "parents": torch.tensor(parents),
        "position": torch.zeros(shape, dtype=torch.int64),
        "slot": torch.zeros(shape, dtype=torch.int64),
        "valid": torch.ones(shape, dtype=torch.bool),
        "candidate": torch.ones(shape, dtype=torch.bool),
    }
    return Draft(**{**fields, **changes})


def greedy(logits: Tensor, draft: Draft) -> Outcome:
    return follow(logits.argmax(dim=-1), logits, draft)


def test_chain_tokens_end_with_the_targets_own() -> None:
    draft = draft_of([[1, 4, 5, 6], [1, 7, 8, 9]], [[-1, 0, 1, 2]] * 2)
    outcome = greedy(one_hot([[4, 5, 3, 2], [2, 8, 9, 1]]), draft)
    assert outcome.path == [[0, 1, 2], [0]]
    assert outcome.tokens == [[4, 5, 3], [2]]
    assert outcome.drafted == [3, 3]


def test_padding_and_riders_are_never_accepted() -> None:
    tokens, parents = [[1, 4, 5, 4, 5]], [[-1, 0, 1, 0, 3]]
    logits = one_hot([[4, 5, 1, 5, 2]])
    assert greedy(logits, draft_of(tokens, parents)).path == [[0, 1, 2]]
    no_first = torch.tensor([[True, False, True, True, True]])
    outcome = greedy(logits, draft_of(tokens, parents, valid=no_first))
    assert (outcome.path, outcome.tokens, outcome.drafted) == ([[0, 3, 4]], [[4, 5, 2]], [3])
    riders = torch.tensor([[True, True, False, True, False]])
    outcome = greedy(logits, draft_of(tokens, parents, candidate=riders))
    assert (outcome.path, outcome.tokens, outcome.drafted) == ([[0, 1]], [[4, 5]], [2])


def test_greedy_with_a_shaping_chooses_by_shaped_logits_and_reports_the_targets_own() -> None:
    rule = Greedy(Shaping({"suppress_tokens": [4]}, (), 10))
    logits = one_hot([[4, 5, 3]]) * 2 + one_hot([[6, 1, 1]])
    nothing: Any = None  # no setting looks at the text
    token, q = rule.draft(nothing, logits[:, :1], [])
    assert (token.tolist(), q) == ([[6]], None)
    outcome = rule.accept(nothing, logits, draft_of([[1, 6, 5]], [[-1, 0, 1]]))
    assert (outcome.tokens, outcome.path) == ([[6, 5, 3]], [[0, 1, 2]])
    assert outcome.logits is logits
    plain = Greedy().accept(nothing, logits, draft_of([[1, 6, 5]], [[-1, 0, 1]]))
    assert plain.tokens == [[4]]
