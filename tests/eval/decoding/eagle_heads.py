"""What the tests of decoding with EAGLE heads share: heads good and bad, and naive twins of what they draft.

The twins know neither cache nor mask: whatever a head says after a path is made of a dense pass over all that is
before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import PreTrainedModel

from eval.decoding.acceptance import Greedy, Rule
from eval.decoding.drafters.base import Drafter
from eval.decoding.drafters.eagle import EagleDraft
from eval.decoding.drafters.eagle2 import HESITATION
from eval.decoding.growing import Shape
from eval.decoding.sampling import OWN, Sampling, gumbel_noise, random_numbers
from eval.decoding.static_tree import RanksPath, TreeShape
from eval.decoding.strategies import make_drafter
from eval.decoding.tree import Draft
from layerskip_model.backbone import Backbone
from layerskip_model.eagle import EagleHead, unrolled
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.runner import Runner
from tests.eval.decoding.medusa_heads import CHAIN, WIDE
from tests.eval.decoding.test_growing import Path
from tests.eval.decoding.test_self_tree import drafts_of
from tests.eval.decoding.test_speculate import PROMPTS, naive_greedy
from tests.layerskip_model.tiny_eagle import READS, Head, half_of
from tests.tiny_models import tiny_model

NEW = 20
CASES: dict[str, tuple[str, TreeShape | Shape]] = {
    "eagle, chain": ("eagle", CHAIN),
    "eagle, tree": ("eagle", WIDE),
    "eagle2, chain": ("eagle2", Shape(4, 1, 4)),
    "eagle2, tree": ("eagle2", Shape(3, 3, 8)),
    "eagle3, chain": ("eagle3", Shape(4, 1, 4)),
    "eagle3, tree": ("eagle3", Shape(3, 3, 8)),
}
"""Strategies with what they draft."""
NO_REPEATS = {"no_repeat_ngram_size": 1}  # forbids what is in the text already


class Twin:
    """A head that has nothing but a text, whose last token is the root of a draft."""

    def __init__(self, model: PreTrainedModel, head: Head, text: list[int]) -> None:
        self._backbone = Backbone(model)
        self._head = head
        self._outputs: dict[Path, Tensor] = {}  # what left the layer at the end of a path
        embedded = self._backbone.embed(torch.tensor(text[1:]))
        self._committed = list(head.inputs(embedded, naive_features(model, head, text[:-1])))

    def after(self, paths: list[Path]) -> Tensor:
        """What follows the root and each of these paths, all of one length: [n, vocab] over the target's tokens.

        Their beginnings have been asked for before.
        """
        texts = []
        for path in paths:
            made = [self._outputs[path[:level]] for level in range(len(path))]
            embedded = self._backbone.embed(torch.tensor(path, dtype=torch.long))
            drafted = [self._head.inputs(token, output) for token, output in zip(embedded, made, strict=True)]
            texts.append(torch.stack([*self._committed, *drafted]))
        outputs = self._head.layer(torch.stack(texts))[:, -1]
        self._outputs |= dict(zip(paths, outputs, strict=True))
        logits = self._head.logits(outputs)
        if isinstance(self._head, EagleHead):
            return logits
        found = torch.full((len(paths), self._backbone.vocab_size), -torch.inf, dtype=logits.dtype)
        found[:, self._head.vocabulary.tokens()] = logits
        return found


def naive_features(model: PreTrainedModel, head: Head, text: list[int]) -> Tensor:
    """What a head reads of the target at every place of a text, [len(text), hidden]."""
    output = model.get_decoder()(input_ids=torch.tensor([text]), output_hidden_states=True)
    if isinstance(head, EagleHead):
        return output.last_hidden_state[0]
    return head.features([output.hidden_states[layer][0] for layer in head.reads])


Prefer = Callable[[list[Path]], Tensor]
"""Paths of one length -> what should be drafted after each, the best highest, [n, vocab]."""


def static_paths(prefer: Prefer, shape: TreeShape) -> list[Path]:
    """The tokens on the way to each node of a static tree."""
    found: dict[RanksPath, Path] = {(): ()}
    for level in range(shape.depth):
        nodes = [ranks for ranks in shape.paths if len(ranks) == level + 1]
        parents = list(dict.fromkeys(ranks[:-1] for ranks in nodes))
        best = prefer([found[ranks] for ranks in parents]).argsort(dim=-1, descending=True).tolist()
        for ranks in nodes:
            token = best[parents.index(ranks[:-1])][ranks[-1]]
            found[ranks] = (*found[ranks[:-1]], token)
    return [found[ranks] for ranks in shape.paths]


def grown_paths(prefer: Prefer, shape: Shape) -> list[Path]:
    """The tokens on the way to each node of a dynamic tree, the likeliest first."""
    score: dict[Path, float] = {(): 0.0}
    frontier: list[Path] = [()]
    for _ in range(shape.depth):
        values, tokens = (prefer(frontier) / HESITATION).log_softmax(dim=-1).topk(shape.width)
        level = []
        for path, row, drafted in zip(frontier, values.tolist(), tokens.tolist(), strict=True):
            for value, token in zip(row, drafted, strict=True):
                score[(*path, token)] = score[path] + value
                level.append((*path, token))
        frontier = sorted(level, key=score.__getitem__, reverse=True)[: shape.width]
    best = sorted([path for path in score if path], key=score.__getitem__, reverse=True)
    return [path for path in best if score[path] > -torch.inf][: shape.count]


def fitted_head(
    kind: str, model: PreTrainedModel, texts: list[list[int]], reads: tuple[int, ...] = READS
) -> Head:
    """A head that has learnt these texts, not all of them well: of its drafts some are right and some wrong.

    `kind`: eagle, or eagle3 with three of five tokens in its vocabulary.
    """
    backbone = Backbone(model)
    torch.manual_seed(0)
    head: Head
    if kind == "eagle":
        head = EagleHead(backbone).double()
    else:
        head = Eagle3Head(backbone, half_of(backbone.vocab_size), reads).double()
    for name, weight in head.named_parameters():
        if weight.ndim > 1 and not name.startswith("projection"):
            weight.data.normal_(std=0.2)  # places far from each other matter
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(12):
        loss = torch.zeros((), dtype=torch.float64)
        for text in texts:
            with torch.no_grad():
                embedded = backbone.embed(torch.tensor([text[1:]]))
            features = naive_features(model, head, text[:-1])[None]
            if kind == "eagle":
                features = features.detach()
            labels = torch.tensor(text)
            if isinstance(head, Eagle3Head):
                labels = head.vocabulary.from_target(labels)
            positions = torch.arange(len(text) - 1)[None]
            for step, output in enumerate(unrolled(head, embedded, features, positions, 3)):
                logits = head.logits(output[0, : len(text) - 2 - step])
                loss = loss + F.cross_entropy(logits, labels[step + 2 :], ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.requires_grad_(False).eval()


def head_for(model: PreTrainedModel, head: Head) -> Head:
    """A copy of a head for another copy of its model, in that one's dtype."""
    backbone = Backbone(model)
    if isinstance(head, EagleHead):
        copied: Head = EagleHead(backbone)
    else:
        copied = Eagle3Head(backbone, head.vocabulary, head.reads)
    copied.to(model.dtype).load_state_dict(head.state_dict())
    return copied.requires_grad_(False).eval()


class Fitted:
    """A model, what it writes after the prompts, and heads that have learnt some of it."""

    def __init__(self, kind: str = "llama", **changes: Any) -> None:
        self.runner = Runner(tiny_model(kind, tie_word_embeddings=False, **changes))
        self.model = self.runner.model
        self.future = [naive_greedy(self.model, prompt, NEW) for prompt in PROMPTS]
        self.heads: dict[str, Head] = {}

    def head(self, strategy: str) -> Head:
        """The head that a strategy drafts with."""
        kind = "eagle3" if strategy == "eagle3" else "eagle"
        if kind not in self.heads:
            texts = [prompt + future for prompt, future in zip(PROMPTS, self.future, strict=True)]
            self.heads[kind] = fitted_head(kind, self.model, texts[:2])
        return self.heads[kind]

    @cached_property
    def drafts(self) -> dict[str, EagleDraft]:
        """Those heads as they are loaded for the model, by strategy."""
        return {name: eagle_draft(self.runner, self.head(name)) for name in ("eagle", "eagle2", "eagle3")}

    def drafter(self, case: str, runner: Runner | None = None) -> Drafter:
        """The strategy of a case, with that head."""
        strategy, shape = CASES[case]
        runner = self.runner if runner is None else runner
        return drafting(strategy, runner, self.drafts[strategy], shape)

    def check_drafts(
        self, case: str, *, new: int = NEW, rule: Rule | None = None, shape: Shape | None = None
    ) -> None:
        """At every step of a decode the draft is the twin's, in what it is and in where it stands."""
        strategy, usual = CASES[case]
        wanted = usual if shape is None else shape
        rule = Greedy() if rule is None else rule
        drafter = drafting(strategy, self.runner, self.drafts[strategy], wanted)
        for texts, draft in drafts_of(self.runner, drafter, PROMPTS, new, rule=rule):
            for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
                levels = (
                    len(prompt) + new - len(text) - 1
                )  # that the row has room for, beside the target's token
                if levels >= 0:  # else it has ended
                    twin = preferring(Twin(self.model, self.head(strategy), text), rule, row, prompt, text)
                    check_draft(draft, row, len(text), twin, wanted, levels)


def preferring(twin: Twin, rule: Rule, row: int, prompt: list[int], text: list[int]) -> Prefer:
    """What a rule prefers of what the twin says: by the noise of the places, without what it forbids."""
    no_repeats = (
        rule.shaping is not None and rule.shaping.contextual
    )  # by the only such setting that tests have

    @torch.inference_mode()
    def prefer(paths: list[Path]) -> Tensor:
        logits = twin.after(paths)
        if no_repeats:
            for said, path in zip(logits, paths, strict=True):
                said[[*text, *path]] = -torch.inf
        if isinstance(rule, Sampling):
            place = len(text) + len(paths[0]) - len(prompt)
            number = random_numbers(rule.seed, [row], place + 1)[0, place, OWN]
            logits = logits + gumbel_noise(torch.tensor(number), logits[0])
        return logits

    return prefer


def check_draft(
    draft: Draft, row: int, length: int, prefer: Prefer, shape: TreeShape | Shape, levels: int
) -> None:
    """The row's drafts are those of the shape, cut to so many levels; `length` of the text, the root included."""
    paths = paths_in(draft, row)
    real = (draft.valid & draft.candidate)[row].tolist()
    for node, path in enumerate(paths):
        assert draft.position[row, node] == length - 1 + len(path)
        assert draft.slot[row, node] == length - 1 + node
        if draft.visible is not None:
            seen = [paths[other] for other in draft.visible[row, node].nonzero().flatten().tolist()]
            assert sorted(seen, key=len) == [path[:level] for level in range(len(path) + 1)]
    drafted = [path for path, is_real in zip(paths[1:], real[1:], strict=True) if is_real]
    if levels == 0:
        assert drafted == []
    elif isinstance(shape, TreeShape):
        assert sorted(drafted) == sorted(static_paths(prefer, shape.cut(depth=levels)))
    else:
        depth = min(shape.depth, levels)
        assert drafted == grown_paths(prefer, Shape(depth, shape.width, shape.count))


def paths_in(draft: Draft, row: int) -> list[Path]:
    """The tokens on the way to each node, the root's left out: its own path is ()."""
    paths: list[Path] = [()]
    for node in range(1, draft.num_nodes):
        paths.append((*paths[int(draft.parents[row, node])], int(draft.tokens[row, node])))
    return paths


def eagle_draft(runner: Runner, head: Head, **own: Any) -> EagleDraft:
    """A head for a runner's model; by default a chain."""
    shapes = {"tree": TreeShape.chain(3), "growth": Shape(3, 1, 3), **own}
    return EagleDraft.of("head", head, runner, **shapes)


def drafting(strategy: str, runner: Runner, draft: EagleDraft, shape: TreeShape | Shape) -> Drafter:
    """The strategy with that head, drafting trees of that shape."""
    if isinstance(shape, TreeShape):
        return make_drafter(strategy, runner, draft=draft, tree=shape)
    sizes = {"num_speculations": shape.depth, "tree_top_k": shape.width, "tree_tokens": shape.count}
    return make_drafter(strategy, runner, draft=draft, **sizes)
