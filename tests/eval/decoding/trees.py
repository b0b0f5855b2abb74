"""Any trees: random ones, and a drafter that proposes them and looks at everything that comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from eval.decoding.acceptance import Greedy, Outcome
from eval.decoding.drafters.base import Drafter, State
from eval.decoding.tree import Draft
from layerskip_model.runner import Runner

TOLERANCE = 1e-5  # norms and softmaxes of float64 models compute in float32


@dataclass(frozen=True)
class Tree:
    """One row's tree of n nodes.

    Attributes:
        parents: after which node each may be accepted; -1 for the root and for padding.
        sees: whose path each sees, beside itself: its parent's, if it is a draft; a rider may see another one's.
        slots: where they lie after the committed prefix.
        riders: nodes that are never accepted.
    """

    parents: list[int]
    sees: list[int]
    slots: list[int]
    riders: list[bool]

    @property
    def padding(self) -> list[bool]:
        return [parent < 0 and node > 0 for node, parent in enumerate(self.parents)]


def random_tree(random: Random, nodes: int, span: int, *, plain: bool = False) -> Tree:
    """A tree of this many nodes in any of `span` slots; a plain one has neither riders nor padding."""
    parents, sees, riders = [-1], [-1], [False]
    real = [0]
    for node in range(1, nodes):
        kind = "draft" if plain else random.choice(["draft"] * 4 + ["rider", "padding"])
        parent = random.choice(real)
        parents.append(-1 if kind == "padding" else parent)
        sees.append(random.choice(real) if kind == "rider" else parents[-1])
        riders.append(kind == "rider")
        if kind != "padding":
            real.append(node)
    slots = [0, *random.sample(range(1, span), nodes - 1)]
    return Tree(parents, sees, slots, riders)


def path_to(parents: list[int], node: int) -> list[int]:
    """The nodes from the root to this one."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def all_paths(parents: list[int], node: int = 0) -> list[list[int]]:
    """Every path that begins at this node."""
    children = [child for child in range(1, len(parents)) if parents[child] == node]
    return [[node]] + [[node, *rest] for child in children for rest in all_paths(parents, child)]


def draft_of(trees: list[Tree], tokens: Tensor, length: Tensor, span: int) -> Draft:
    """These trees, one a row, after committed texts of length [batch, 1]; tokens [batch, n]."""
    nodes = tokens.shape[1]
    visible = torch.zeros((*tokens.shape, nodes), dtype=torch.bool)
    depth = torch.zeros_like(tokens)
    for row, tree in enumerate(trees):
        for node in range(nodes):
            path = path_to(tree.sees, node)
            visible[row, node, path] = True
            depth[row, node] = len(path) - 1
    return Draft(
        tokens=tokens,
        parents=torch.tensor([tree.parents for tree in trees]),
        position=length + depth,
        slot=length + torch.tensor([tree.slots for tree in trees]),
        valid=~torch.tensor([tree.padding for tree in trees]),
        candidate=~torch.tensor([tree.riders for tree in trees]),
        visible=visible if any(any(tree.riders) for tree in trees) else None,
        made=span,
    )


class Trees(Drafter):
    """Proposes the trees of a forest in turn, a list with one tree a row each.

    Most tokens are right: those of `future`, which follows each prompt. After every step it compares all logits with
    separate passes over the path of each node, and the cache with a fresh prefill.
    """

    @dataclass(frozen=True)
    class Settings:
        """It has none."""

    def __init__(
        self, runner: Runner, forest: list[list[Tree]], future: list[list[int]], entry: int, random: Random
    ) -> None:
        super().__init__(runner, Trees.Settings())
        self.forest = forest
        self.future = future
        self.entry = entry
        self.random = random
        self.max_nodes = 1 + max(slot for trees in forest for tree in trees for slot in tree.slots)
        self.steps = 0

    def start(self, state: State, prompts: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """Nothing is needed of the prefill."""
        self.state = state

    def propose(self, state: State) -> Draft:
        """The next tree, run through the layers before its entry."""
        self.trees = self.forest[self.steps % len(self.forest)]
        self.committed = [
            text[:length] for text, length in zip(state.texts, state.lengths, strict=True)
        ]  # as it was
        tokens = torch.tensor([self._tokens(row, tree) for row, tree in enumerate(self.trees)])
        tokens[:, :1] = state.last
        draft = draft_of(self.trees, tokens, torch.tensor(state.lengths)[:, None], self.max_nodes)
        if self.entry == 0:
            return draft
        hidden = self.runner.run(self.runner.embed(tokens), 0, self.entry, state.context(draft))
        return Draft(**{**vars(draft), "entry_layer": self.entry, "hidden": hidden})

    def advance(self, outcome: Outcome) -> None:
        """Compare."""
        self.steps += 1
        rows = [row for row, path in enumerate(outcome.path) if path]
        self._compare_logits(outcome, rows)
        for row in rows:
            if not self.state.finished[row]:
                self._compare_cache(row)

    def _tokens(self, row: int, tree: Tree) -> list[int]:
        done = self.state.lengths[row] - self.state.prompt_lengths[row]
        depths = [len(path_to(tree.parents, node)) - 1 for node in range(len(tree.parents))]
        right = [self.future[row][done + depth] for depth in depths]
        return [token if self.random.random() < 0.7 else self.random.randrange(6) for token in right]

    def _compare_logits(self, outcome: Outcome, rows: list[int]) -> None:
        nodes = [(row, node) for row in rows for node in range(len(self.trees[row].sees))]
        nodes = [(row, node) for row, node in nodes if not self.trees[row].padding[node]]
        texts = [
            self.committed[row] + outcome.draft.tokens[row, path_to(self.trees[row].sees, node)].tolist()
            for row, node in nodes
        ]
        width = max(map(len, texts))
        padded = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        logits = self.runner.model(input_ids=padded, use_cache=False).logits
        expected = logits[range(len(texts)), [len(text) - 1 for text in texts]]
        row, node = torch.tensor(nodes).unbind(1)
        torch.testing.assert_close(outcome.logits[row, node], expected, rtol=0, atol=TOLERANCE)

    def _compare_cache(self, row: int) -> None:
        length = self.state.lengths[row]
        text = self.state.texts[row][:length]
        fresh = State(self.runner, [text], length, 1, Greedy())
        ids = torch.tensor([text])
        self.runner.run(self.runner.embed(ids), 0, self.runner.num_layers, fresh.chain_context(0, length))
        for ours, theirs in (
            *zip(self.state.cache.keys, fresh.cache.keys, strict=True),
            *zip(self.state.cache.values, fresh.cache.values, strict=True),
        ):
            assert ours is not None
            assert theirs is not None
            torch.testing.assert_close(ours[row, :, :length], theirs[0, :, :length], rtol=0, atol=TOLERANCE)
