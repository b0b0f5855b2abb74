"""The trees that give the most tokens per second with given heads, on this machine: `python -m eval tree`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_type_hints

from eval.choosing import Choosing, make_rule
from eval.decoding.acceptance import Rule
from eval.decoding.drafters.base import Drafter
from eval.decoding.drafters.eagle2 import Eagle2
from eval.decoding.drafters.heads import HeadsDrafter
from eval.decoding.growing import Shape
from eval.decoding.static_tree import TreeShape
from eval.decoding.strategies import STRATEGIES, make_drafter
from eval.draft_heads import drafting_strategy
from eval.drafts import loaded
from eval.prompts import dataset_path, encode_prompts, evenly_spaced
from eval.target import Target
from eval.tree_costs import AnyShape, Costs, measure_costs
from eval.tree_growth import WIDTHS, growth_length, to_measure, trees_of, watch
from eval.tree_race import Candidate, finalists, race, shown, valued
from eval.tree_ranks import Accuracy, Text, accuracies, continued, text_ranks
from eval.tree_static import Shapes
from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_prompts

MOST_NODES = 511
FALLING = 0.95  # of the best prediction: where a width's best is below, wider trees are not looked at
BOTH = {"eagle2": ("eagle", "eagle2")}
"""heads that draft static trees and dynamic ones: by their strategy, the strategies"""


@dataclass(frozen=True)
class Request:
    """Which texts trees are judged by, and how large they may be. Raises UserError for impossible ones."""

    dataset: str = "heldout"
    num_samples: int | None = None
    max_steps: int = 128
    max_nodes: int = 63
    choosing: Choosing = field(default_factory=Choosing)

    def __post_init__(self) -> None:
        if not 1 <= self.max_nodes <= MOST_NODES:
            raise UserError(f"--max_nodes {self.max_nodes}: give 1 to {MOST_NODES}")
        if self.num_samples is not None and self.num_samples < 2:
            raise UserError(
                f"--num_samples {self.num_samples}: give 2 or more; what one half chooses is judged by the other"
            )
        if self.max_steps < 2:
            raise UserError(
                f"--max_steps {self.max_steps}: give 2 or more; drafts follow the first new token"
            )
        if not self.choosing.lossless:
            raise UserError(
                "--acceptance typical: trees are judged by texts that are the same whatever drafts; leave it out"
            )


@dataclass(frozen=True)
class Search:
    """What was found for one strategy.

    Attributes:
        best: of all candidates, by the race.
        shown: some of them by their nodes, see `eval.tree_race.shown`.
    """

    strategy: str
    best: Candidate
    shown: list[Candidate]
    costs: Costs


@dataclass(frozen=True)
class Findings:
    """What was found for heads.

    Attributes:
        draft: how the heads are called.
        searches: one, or for an EAGLE head one of static trees and one of dynamic ones.
        accuracies: of heads that draft static trees; else none.
        texts: how many were continued.
    """

    draft: str
    searches: list[Search]
    accuracies: list[Accuracy]
    texts: int


def draft_name(target: Target, draft: str | None) -> str:
    """The heads that are meant: those of that name, else those of the target's run. Raises UserError."""
    if draft is not None:
        return draft
    heads = None if target.run is None else target.run.heads
    if heads is None:
        raise UserError(
            f"'{target.name}' comes with no heads; name some by --draft DIR, or the --run that trained them"
        )
    return str(heads)


def search_trees(target: Target, draft: str, request: Request) -> Findings:
    """Look for the best trees, static and dynamic, for the heads of that name. Raises UserError."""
    # 1. Everything that can be refused is refused now.
    strategy = drafting_strategy(draft)
    if not issubclass(STRATEGIES[strategy], HeadsDrafter | Eagle2):
        raise UserError(
            f"--draft '{draft}' has no heads that draft trees; name a directory of Medusa, Hydra or EAGLE heads"
        )
    heads = loaded(target, get_type_hints(STRATEGIES[strategy].Settings)["draft"], draft)
    rule = make_rule(target, request.choosing)
    rows = read_prompts(dataset_path(target, request.dataset))
    prompts = encode_prompts(target, evenly_spaced(rows, request.num_samples))

    # 2. What the target says itself.
    texts = continued(target, prompts, request.max_steps, request.choosing)
    texts = [text for text in texts if len(text.new) > 1]  # drafts follow the first new token
    if len(texts) < 2:
        raise UserError(
            f"{request.dataset}: {('no', 'only one')[len(texts)]} prompt can be continued; give 2 or more"
        )

    searches: list[Search] = []
    rights: list[Accuracy] = []
    for name in BOTH.get(strategy, (strategy,)):
        task = Task(target, name, heads, texts, rule, request.max_nodes)
        if issubclass(STRATEGIES[name], HeadsDrafter):
            found, rights = search_static(task)
        else:
            found = search_growth(task)
        searches.append(found)
    return Findings(draft, searches, rights, len(texts))


@dataclass(frozen=True)
class Task:
    """What a search is about: trees of up to `most` nodes for these heads with that strategy, on these texts."""

    target: Target
    strategy: str
    heads: Any
    texts: list[Text]
    rule: Rule
    most: int

    def make(self, shape: AnyShape) -> Drafter:
        """What drafts that tree."""
        settings: dict[str, Any] = {"tree": shape}
        if isinstance(shape, Shape):
            settings = {
                "num_speculations": shape.depth,
                "tree_top_k": shape.width,
                "tree_tokens": shape.count,
            }
        return make_drafter(self.strategy, self.target.runner, draft=self.heads, **settings)

    def costs(self, shapes: Sequence[AnyShape]) -> Costs:
        """What steps cost."""
        return measure_costs(self.target, self.make, shapes, middle_of(self.texts), self.rule)

    def decided(
        self,
        racing: Sequence[Candidate],
        candidates: Sequence[Candidate],
        costs: Costs,
        texts: Sequence[Text],
    ) -> Search:
        """What comes of a race of some candidates over these texts."""
        raced = race(self.target, self.make, racing, texts, self.rule)
        best = max(raced, key=lambda one: one.raced or 0.0)
        return Search(self.strategy, best, shown(candidates, raced, self.most), costs)


def search_static(task: Task) -> tuple[Search, list[Accuracy]]:
    """The best static tree, and where the heads are right."""
    # 3. Where in the texts the heads are right, and the trees that this makes worth having.
    chain = cast(HeadsDrafter, task.make(TreeShape.chain(task.heads.number)))
    ranks = [text_ranks(chain, text, task.rule) for text in task.texts]
    shapes = Shapes([one[:, 1:] for one in ranks], task.most)
    # 4. What steps cost: of chains, then of trees so deep that they may win.
    costs = task.costs(shapes.chains())
    chains = [valued(shape, shapes.length(shape), costs) for shape in shapes.chains()]
    depths = [
        depth
        for depth in shapes.depths
        if may_win(depth, (shapes.length(shape) for shape in shapes.trees(depth)), chains, costs)
    ]
    measured = [shape for depth in depths for shape in shapes.to_measure(depth)]
    costs = costs.with_trees(task.costs(measured)) if measured else costs
    # 5. Tokens per second of every tree, and a race.
    trees = [valued(shape, shapes.length(shape), costs) for depth in depths for shape in shapes.trees(depth)]
    candidates = chains + trees
    racing = finalists(candidates, task.most)
    return task.decided(racing, candidates, costs, task.texts[1::2]), accuracies(ranks)


def search_growth(task: Task) -> Search:
    """The best dynamic tree or chain, chosen by every second text; what is told of it is of the others."""
    words = cast(Eagle2, task.make(Shape(1, 1, 1))).layer.words
    chosen: list[Candidate] = []
    lengths: dict[AnyShape, float] = {}
    costs = Costs()
    for width in [width for width in WIDTHS if width <= words]:
        # 3. What trees of that width would win.
        needed = watch(task.target, task.make, width, task.texts, task.rule)
        groups = trees_of(width, task.most)
        by = {shape: growth_length(needed[::2], shape) for shapes in groups for shape in shapes}
        # 4. What steps cost: of chains, then of trees so deep that they may win.
        if width == 1:
            costs = task.costs(list(by))
        else:
            groups = [one for one in groups if may_win(one[0].depth, map(by.__getitem__, one), chosen, costs)]
            costs = costs.with_trees(task.costs(to_measure(groups))) if groups else costs
        found = [valued(shape, by[shape], costs) for shapes in groups for shape in shapes]
        lengths |= {one.shape: growth_length(needed[1::2], cast(Shape, one.shape)) for one in found}
        best = max(one.predicted for one in chosen + found)
        chosen += found
        # Wider trees cost more, and win less and less beside these.
        if max((one.predicted for one in found), default=0.0) < FALLING * best:
            break
    # 5. A race on the other texts.
    judged = {one.shape: valued(one.shape, lengths[one.shape], costs) for one in chosen}
    racing = [judged[one.shape] for one in finalists(chosen, task.most)]
    return task.decided(racing, list(judged.values()), costs, task.texts[1::2])


def may_win(depth: int, lengths: Iterable[float], chains: Sequence[Candidate], costs: Costs) -> bool:
    """Whether a tree of that depth could beat the best chain if it cost no more than the chain of its depth."""
    best = max(one.predicted for one in chains)
    return max(lengths, default=0.0) * costs.plain / costs.at_least(depth) > best


def middle_of(texts: Sequence[Text]) -> list[int]:
    """A text as long as decoding them finds in the cache: one of them up to the middle of its continuation."""
    middles = sorted((text.tokens[: (text.given + len(text.tokens)) // 2] for text in texts), key=len)
    return middles[len(middles) // 2]
