"""The rule of speculative sampling, integrated exactly over all its random numbers."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from eval.decoding import sampling
from eval.decoding.acceptance import Outcome
from eval.decoding.drafters.base import State
from eval.decoding.sampling import (
    ACCEPT,
    DRAFT,
    OWN,
    Sampling,
    acceptance,
    draw,
    gumbel_noise,
    own_weights,
)
from eval.decoding.shaping import Shaping
from eval.decoding.tree import Draft
from layerskip_model.errors import UserError

Text = tuple[int, ...]
Tables = dict[Text, list[float]]  # the text so far -> the distribution of the next token


def texts(vocabulary: int, longest: int) -> list[Text]:
    return [text for length in range(longest + 1) for text in product(range(vocabulary), repeat=length)]


def arbitrary(vocabulary: int, drafts: int, seed: int) -> tuple[Tables, Tables]:
    """p and q of every text: some tokens impossible in either, some places with p = q or one-hot."""
    generator = np.random.default_rng(seed)
    p: Tables = {}
    q: Tables = {}
    for text in texts(vocabulary, drafts):
        for table in (p, q):
            weights = generator.dirichlet(np.full(vocabulary, 0.7)) * (generator.random(vocabulary) < 0.7)
            weights = weights if weights.any() else np.eye(vocabulary)[generator.integers(vocabulary)]
            table[text] = (weights / weights.sum()).tolist()
        if generator.random() < 0.2:
            q[text] = p[text]
    return p, q


def on_grid(vocabulary: int, drafts: int, parts: int, seed: int) -> tuple[Tables, Tables]:
    """p and q of every text in multiples of 1 / parts."""
    generator = np.random.default_rng(seed)

    def one() -> list[float]:
        return (generator.multinomial(parts, generator.dirichlet(np.ones(vocabulary))) / parts).tolist()

    all_texts = texts(vocabulary, drafts)
    return {text: one() for text in all_texts}, {text: one() for text in all_texts}


def p_of_texts(p: Tables, vocabulary: int, length: int) -> dict[Text, float]:
    """The target's probability of every text of this length."""
    return {
        text: float(np.prod([p[text[:place]][token] for place, token in enumerate(text)]))
        for text in product(range(vocabulary), repeat=length)
    }


def completed(won: dict[Text, float], p: Tables, vocabulary: int, length: int) -> dict[Text, float]:
    """Texts of any lengths, each continued to this length by p."""
    result = dict.fromkeys(product(range(vocabulary), repeat=length), 0.0)
    for text, mass in won.items():
        for rest in product(range(vocabulary), repeat=length - len(text)):
            whole = text + rest
            steps = [p[whole[:place]][whole[place]] for place in range(len(text), length)]
            result[whole] += mass * float(np.prod(steps))
    return result


def add(won: dict[Text, float], text: Text, mass: float) -> None:
    won[text] = won.get(text, 0.0) + mass


@pytest.mark.parametrize(("vocabulary", "drafts"), [(3, 1), (5, 1), (3, 2), (4, 2), (3, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_every_branch_together_gives_the_targets_distribution(
    vocabulary: int, drafts: int, seed: int
) -> None:
    """Sum over all drafts, all places of the first rejection and all tokens that replace it."""
    p, q = arbitrary(vocabulary, drafts, seed)
    won: dict[Text, float] = {}
    for draft in product(range(vocabulary), repeat=drafts):
        p_nodes = torch.tensor([[p[draft[:place]] for place in range(drafts + 1)]], dtype=torch.float64)
        q_nodes = torch.tensor([[q[draft[:place]] for place in range(drafts)]], dtype=torch.float64)
        accepted = acceptance(p_nodes, q_nodes, torch.tensor([draft]))[0].tolist()
        mass = float(np.prod([q[draft[:place]][token] for place, token in enumerate(draft)]))
        if mass == 0.0:
            continue  # never drafted
        for count in range(drafts + 1):
            proposed, taken = torch.ones((1, drafts), dtype=torch.bool), torch.tensor([[count]])
            weights = own_weights(p_nodes, q_nodes, proposed, taken)[0, 0]
            reached = mass * (1.0 if count == drafts else 1.0 - accepted[count])
            for token, share in enumerate((weights / weights.sum()).tolist()):
                add(won, (*draft[:count], token), reached * share)
            mass *= accepted[count] if count < drafts else 1.0
    result = completed(won, p, vocabulary, drafts + 1)
    for text, wanted in p_of_texts(p, vocabulary, drafts + 1).items():
        assert result[text] == pytest.approx(wanted, abs=1e-12)


def stub_state(rows: int, places: int) -> Any:
    """What the rule reads of a state: one token of prompt, nothing emitted."""
    return SimpleNamespace(
        batch=rows,
        streams=list(range(rows)),
        prompt_lengths=[1] * rows,
        length=torch.zeros((rows, 1), dtype=torch.int64),
        cache=SimpleNamespace(capacity=places + 1),
        finished=[False] * rows,
        texts=[[0]] * rows,
    )


def chain(tokens: Tensor, q: Tensor | None, **changes: Tensor) -> Draft:
    """The chain of these tokens [rows, n] after an empty prefix, all of it up for acceptance."""
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    true = torch.ones_like(tokens, dtype=torch.bool)
    fields: dict[str, Any] = {"valid": true, "candidate": true, **changes}
    return Draft(tokens=tokens, parents=place - 1, position=place, slot=place, q=q, is_chain=True, **fields)


class Numbered(Sampling):
    """The target's own token is drawn by its place's one number: so all that can happen can be gone through."""

    def own(self, state: State, shaped: Tensor, draft: Draft) -> Tensor:
        return self.own_at(shaped, draft.position + 1)

    def own_at(self, logits: Tensor, position: Tensor) -> Tensor:
        weights = logits.exp()
        tokens = draw(weights, self.numbers(position, OWN))
        return torch.where(weights.gather(2, tokens[..., None])[..., 0] > 0, tokens, -1)


def accept_with(numbers: Tensor, p: Tensor, draft: Draft, patch: pytest.MonkeyPatch) -> Outcome:
    """The rule's verdict with these numbers [rows, places, 3]; p [rows, n, vocab]."""
    patch.setattr(sampling, "random_numbers", lambda *_: numbers.numpy())
    rule = Numbered(Shaping({}, (), p.shape[2]), seed=0)
    state = stub_state(len(numbers), numbers.shape[1])
    rule.begin(state)
    return rule.accept(state, p.log(), draft)


@pytest.mark.parametrize(
    ("vocabulary", "drafts", "parts", "seed"), [(4, 1, 6, 0), (3, 2, 4, 1), (3, 3, 3, 2)]
)
def test_the_rule_itself_over_a_grid_of_all_its_numbers(
    vocabulary: int, drafts: int, parts: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p and q are multiples of 1 / parts: then numbers in the middle of cells of 1 / lcm stand for all numbers."""
    p, q = on_grid(vocabulary, drafts, parts, seed)
    cells = int(np.lcm.reduce(np.arange(1, parts + 1)))
    middle = [(cell + 0.5) / cells for cell in range(cells)]
    possible = [
        draft
        for draft in product(range(vocabulary), repeat=drafts)
        if all(q[draft[:place]][token] for place, token in enumerate(draft))
    ]
    cases = list(product(possible, product(middle, repeat=drafts), middle))
    tokens = torch.tensor([(0, *draft) for draft, _, _ in cases])
    numbers = torch.full((len(cases), drafts + 2, 3), torch.nan, dtype=torch.float64)
    numbers[:, :drafts, ACCEPT] = torch.tensor([kept for _, kept, _ in cases], dtype=torch.float64)
    numbers[:, : drafts + 1, OWN] = torch.tensor([own for _, _, own in cases], dtype=torch.float64)[:, None]
    p_nodes = [[p[draft[:place]] for place in range(drafts + 1)] for draft, _, _ in cases]
    q_nodes = [[q[draft[:place]] for place in range(drafts)] for draft, _, _ in cases]
    draft_nodes = chain(tokens, torch.tensor(q_nodes, dtype=torch.float64))
    outcome = accept_with(numbers, torch.tensor(p_nodes, dtype=torch.float64), draft_nodes, monkeypatch)
    won: dict[Text, float] = {}
    for (draft, _, _), emitted in zip(cases, outcome.tokens, strict=True):
        mass = float(np.prod([q[draft[:place]][token] for place, token in enumerate(draft)]))
        add(won, tuple(emitted), mass / cells ** (drafts + 1))
    result = completed(won, p, vocabulary, drafts + 1)
    for text, wanted in p_of_texts(p, vocabulary, drafts + 1).items():
        assert result[text] == pytest.approx(wanted, abs=1e-12)


def naive_draw(weights: list[float], number: float) -> int:
    total = 0.0
    for token, weight in enumerate(weights):
        total += weight
        if weight > 0 and total > number * sum(weights):
            return token
    raise AssertionError("no token")


def naive_accept(
    p: list[list[float]], q: list[list[float]], draft: list[int], up: list[bool], numbers: list[list[float]]
) -> list[int]:
    """Algorithm 1 of arXiv 2211.17192 for one row; numbers[place] = (draft, accept, own)."""
    won: list[int] = []
    for place, token in enumerate(draft):
        if not up[place]:
            return [*won, naive_draw(p[place], numbers[place][OWN])]
        if numbers[place][ACCEPT] >= min(1.0, p[place][token] / q[place][token]):
            rest = [max(a - b, 0.0) for a, b in zip(p[place], q[place], strict=True)]
            return [*won, naive_draw(rest, numbers[place][OWN])]
        won.append(token)
    return [*won, naive_draw(p[len(draft)], numbers[len(draft)][OWN])]


@pytest.mark.parametrize("drafts", [0, 1, 4])
def test_the_rule_equals_the_algorithm_as_published(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with padding and with nodes that only ride along, too."""
    rows, vocabulary = 300, 7
    generator = torch.Generator().manual_seed(drafts)
    p = torch.rand((rows, drafts + 1, vocabulary), generator=generator, dtype=torch.float64).pow(3)
    q = p[:, :drafts] * torch.rand((rows, drafts, vocabulary), generator=generator, dtype=torch.float64)
    p, q = p / p.sum(2, keepdim=True), q / q.sum(2, keepdim=True)
    numbers = torch.rand((rows, drafts + 2, 3), generator=generator, dtype=torch.float64)
    tokens = draw(q, numbers[:, :drafts, DRAFT])
    room = torch.randint(1, drafts + 2, (rows, 1), generator=generator)
    valid = torch.arange(drafts + 1) < room
    candidate = torch.rand((rows, drafts + 1), generator=generator) < 0.9
    draft = chain(F.pad(tokens, (1, 0)), q if drafts else None, valid=valid, candidate=candidate)
    outcome = accept_with(numbers, p, draft, monkeypatch)
    up = (valid & candidate)[:, 1:]
    for row in range(rows):
        expected = naive_accept(
            p[row].tolist(), q[row].tolist(), tokens[row].tolist(), up[row].tolist(), numbers[row].tolist()
        )
        assert outcome.tokens[row] == expected
        assert outcome.path[row] == list(range(len(expected)))
    assert outcome.drafted == up.sum(dim=1).tolist()


def test_equal_distributions_are_always_accepted() -> None:
    p = torch.tensor([[[0.1, 0.2, 0.7]]])
    assert acceptance(p, p, torch.tensor([[1]])).tolist() == [[1.0]]


def test_a_rejection_by_rounding_leaves_the_target_itself() -> None:
    """p sums to a little less than q and is nowhere larger: the residual is nothing."""
    q = torch.tensor([[[0.25, 0.75]]])
    p = torch.tensor([[[0.25, 0.75 - 2**-24], [0.5, 0.5]]])
    proposed, taken = torch.tensor([[True]]), torch.tensor([[0]])
    assert own_weights(p, q, proposed, taken).tolist() == p[:, :1].tolist()


def test_the_drafter_leaves_out_what_the_target_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """q is 0 where p is not and the reverse: the draft is rejected and the residual is p itself."""
    p = torch.tensor([[[0.0, 0.4, 0.6], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    q = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64)
    for number, token in ((0.0, 1), (0.39, 1), (0.41, 2), (1.0, 2)):
        numbers = torch.full((1, 3, 3), 0.0, dtype=torch.float64)
        numbers[..., OWN] = number
        outcome = accept_with(numbers, p, chain(torch.tensor([[0, 0]]), q), monkeypatch)
        assert (outcome.tokens, outcome.path) == ([[token]], [[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(dtype: torch.dtype) -> None:
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 5.0, 0.0], dtype=dtype)
    grid = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    assert draw(weights.expand(8, 6), grid).tolist() == [1, 1, 3, 4, 4, 4, 4, 4]
    edges = torch.tensor([0.0, 0.25, 0.375, 1.0], dtype=torch.float64)
    assert draw(weights.expand(4, 6), edges).tolist() == [1, 3, 4, 4]


def test_a_draw_never_gives_what_is_impossible() -> None:
    """Sums of many small numbers are rounded; the numbers at both ends of the range are the dangerous ones."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand((64, 5000), generator=generator) ** 20
    weights[torch.rand(weights.shape, generator=generator) < 0.6] = 0.0
    for number in (0.0, 2.0**-53, 1 - 2.0**-53, 1.0):
        tokens = draw(weights, torch.full((64,), number, dtype=torch.float64))
        assert (weights.gather(1, tokens[:, None]) > 0).all()


def test_trees_of_drawn_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.zeros((1, 4, 3), dtype=torch.float64)
    p = torch.full((1, 3, 2), 0.5, dtype=torch.float64)
    tokens = torch.tensor([[0, 1, 1]])
    tree = Draft(**{**vars(chain(tokens, p[:, :2])), "is_chain": False})
    with pytest.raises(ValueError, match="chains"):
        accept_with(numbers, p, tree, monkeypatch)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_row_that_nothing_can_follow_is_an_error_unless_it_has_ended(value: float) -> None:
    rule = Sampling(Shaping({}, (), 3), seed=0)
    state = stub_state(2, 2)
    rule.begin(state)
    logits = torch.tensor([[[0.0, 1.0, 2.0]], [[value] * 3]])
    with pytest.raises(UserError, match="prompt 1: no token has a probability"):
        rule.accept(state, logits, chain(torch.zeros((2, 1), dtype=torch.int64), None))
    state.finished = [False, True]
    assert len(rule.accept(state, logits, chain(torch.zeros((2, 1), dtype=torch.int64), None)).tokens) == 2


def test_a_step_makes_the_noise_of_its_places_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks first, and for as many places as the step before wanted; the next step makes its own."""
    made: list[int] = []

    def counting(numbers: Tensor, like: Tensor) -> Tensor:
        made.append(numbers.shape[1])
        return gumbel_noise(numbers, like)

    monkeypatch.setattr(sampling, "gumbel_noise", counting)
    rule, state, generator = Sampling(Shaping({}, (), 50), seed=3), stub_state(2, 20), torch.Generator()
    rule.begin(state)
    for committed, reach in ((0, 4), (3, 4), (5, 6), (9, 1), (10, 1)):
        state.length = torch.tensor([[committed], [committed + 2]])
        tokens = [torch.zeros((2, 1), dtype=torch.int64)]
        logits = torch.randn((2, reach, 50), generator=generator)
        place = state.length + torch.arange(1, reach + 1)
        wanted = (logits + gumbel_noise(rule.numbers(place, OWN), logits)).argmax(dim=-1)
        for node in range(reach - 1):
            tokens.append(rule.first_choice(state, logits[:, node : node + 1], tokens))
        draft = chain(torch.cat(tokens, dim=1), None)
        assert draft.tokens[:, 1:].tolist() == wanted[:, :-1].tolist()
        assert rule.own(state, logits, draft).tolist() == wanted.tolist()
    assert made == [1, 2, 3, 4, 4, 4, 5, 6, 6, 1]


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "suppress_tokens": [2]},
    {"repetition_penalty": 1.2, "bad_words_ids": [[1], [2, 3]], "min_new_tokens": 3, "typical_p": 0.9},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_reads_the_device_once(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data cannot be read at all: drafting does not try to, accepting does once."""
    with torch.device("meta"):
        state = stub_state(2, 4)
        token, logits = torch.zeros((2, 1), dtype=torch.int64), torch.zeros((2, 1, 6))
    rule = Sampling(Shaping(settings, (5,), 6), seed=0)
    rule.begin(state)
    first, q = rule.draft(state, logits, [token])
    second, _ = rule.draft(state, logits, [token, first])
    assert q is not None
    read = []

    def tolist(tensor: Tensor) -> list[list[int]]:
        read.append(tensor.shape)
        return [[2, 4, 2, 3, 3]] * 2  # two taken, the own token 4, two drafted: 3 and 3

    draft = chain(torch.cat([token, first, second], dim=1), torch.cat([q, q], dim=1))
    monkeypatch.setattr(Tensor, "tolist", tolist)
    outcome = rule.accept(state, logits.expand(2, 3, 6), draft)
    assert read == [(2, 5)]
    assert outcome.tokens == [[3, 3, 4]] * 2
