"""A toy drafter that uses every field of the contract at once.

It knows the right continuation, so that what is accepted is known: a tree with wrong and right branches,
nodes in shuffled slots, a row that rides along unverified under a mask of its own, padding, two prompts of
different length, and an entry in mid-stack with hidden states that the drafter made itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from eval.decoding.acceptance import Outcome
from eval.decoding.drafters.base import Drafter, State
from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.decoding.tree import Draft, ancestor_mask
from layerskip_model.runner import Runner
from tests.tiny_models import tiny_model

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12]]
NEW = 14
ENTRY = 2

# node     0 root, 1 wrong, 2 right, 3 right again but riding along, 4 after 2: wrong, 5 after 2: right,
#          6 after 5: right but padding in the second prompt
PARENTS = [-1, 0, 0, 0, 2, 2, 5]
RIDER = 3
ORDER = [0, 6, 3, 1, 5, 2, 4]
AHEAD = [0, None, 1, 1, None, 2, 3]  # how far ahead of the root a right token is


class Toy(Drafter):
    """Drafts from the known continuation `future` of each prompt."""

    @dataclass(frozen=True)
    class Settings:
        """It has none."""

    needs = (ENTRY, 3)
    max_nodes = 7

    def __init__(self, runner: Runner, future: list[list[int]]) -> None:
        super().__init__(runner, Toy.Settings())
        self.future = future
        self.begun: list[int] = []
        self.outcomes: list[Outcome] = []
        self.prefill: dict[int, Tensor] = {}

    def start(self, state: State, prompts: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """Note where the prompts end, and the states of the prefill."""
        self.begun = [len(prompt) for prompt in prompts]
        self.prefill = hidden

    def propose(self, state: State) -> Draft:
        """The tree above, run through the first layers."""
        tokens = []
        for row, begun in enumerate(self.begun):
            done = state.lengths[row] - begun
            right = [self.future[row][done + ahead] if ahead is not None else -1 for ahead in AHEAD]
            tokens.append([(right[2] + 7) % 64 if token < 0 else token for token in right])
        length = torch.tensor(state.lengths)[:, None]
        parents = torch.tensor([PARENTS, [*PARENTS[:6], -1]])
        visible = ancestor_mask(parents)
        visible[:, RIDER, 1] = True  # it sees the wrong branch, which is no ancestor of its
        depth = torch.tensor([[0, 1, 1, 2, 2, 2, 3]])
        draft = Draft(
            tokens=torch.tensor(tokens),
            parents=parents,
            position=length + depth,
            slot=length + torch.tensor([ORDER]),
            valid=torch.tensor([[True] * 7, [True] * 6 + [False]]),
            candidate=torch.tensor([[node != RIDER for node in range(7)]] * 2),
            visible=visible,
        )
        hidden = self.runner.run(self.runner.embed(draft.tokens), 0, ENTRY, state.context(draft))
        return Draft(**{**vars(draft), "entry_layer": ENTRY, "hidden": hidden})

    def advance(self, outcome: Outcome) -> None:
        """Note it."""
        self.outcomes.append(outcome)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
def test_every_field_of_the_contract(kind: str) -> None:
    model = tiny_model(kind)
    runner = Runner(model)
    plain = decode(
        runner, make_drafter("autoregressive", runner), PROMPTS, max_new_tokens=NEW + 8, eos_token_ids=()
    )
    toy = Toy(runner, [row.tokens for row in plain])
    expected = [row.tokens[:NEW] for row in plain]
    rows = decode(runner, toy, PROMPTS, max_new_tokens=NEW, eos_token_ids=())
    assert [row.tokens for row in rows] == expected
    # 13 tokens after the first: four a step where the deepest node is valid, three where it is padding.
    assert [row.accepted_lengths for row in rows] == [[4, 4, 4, 4], [3, 3, 3, 3, 3]]
    assert [row.drafted for row in rows] == [4 * 5, 5 * 4]
    assert [row.accepted for row in rows] == [4 * 3, 5 * 2]
    assert rows[0].proposals_at == []  # positions are those of chains
    check_outcomes(toy)


def check_outcomes(toy: Toy) -> None:
    """Logits and states of all rows, accepted or not, are those of a separate pass over each node's text."""
    model = toy.runner.model
    committed = [len(prompt) for prompt in PROMPTS]
    for step, outcome in enumerate(toy.outcomes):
        assert sorted(outcome.states) == [ENTRY, 3]
        for row, prompt in enumerate(PROMPTS):
            if step == 4 and row == 0:
                assert (outcome.path[row], outcome.tokens[row]) == ([], [])  # it had ended
                continue
            assert outcome.path[row] == ([0, 2, 5, 6] if row == 0 else [0, 2, 5])
            text = (prompt + toy.future[row])[: committed[row]]
            for node, parents in ((1, [0]), (2, [0]), (4, [0, 2]), (5, [0, 2]), (RIDER, [0, 1])):
                path = [*parents, node]
                ids = torch.tensor([text + outcome.draft.tokens[row, path].tolist()])
                with torch.inference_mode():
                    output = model(input_ids=ids, output_hidden_states=True)
                close(outcome.logits[row, node], output.logits[0, -1])
                close(outcome.states[ENTRY][row, node], output.hidden_states[ENTRY + 1][0, -1])
            committed[row] += len(outcome.path[row])
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([PROMPTS[1]]), output_hidden_states=True).hidden_states
    close(toy.prefill[ENTRY][1, : len(PROMPTS[1])], states[ENTRY + 1][0])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
