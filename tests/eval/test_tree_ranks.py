"""Ranks along a text against heads asked place by place, and against what decoding with trees then does."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch

from eval.decoding.acceptance import Greedy, Rule
from eval.decoding.drafters.base import Drafter
from eval.decoding.drafters.heads import HeadsDrafter
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.static_tree import TreeShape
from eval.prompts import Prompt
from eval.target import Target
from eval.tree_ranks import MISSING, TOP, Text, accuracies, continued, ranks_of, text_ranks
from eval.tree_shapes import accepted_drafts, decoded
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.eval.decoding import eagle_heads, hydra_heads, medusa_heads
from tests.eval.decoding.medusa_heads import CHAIN, WIDE, medusa, naive_ranks
from tests.eval.decoding.test_self_tree import run
from tests.eval.decoding.test_speculate import PROMPTS, naive_greedy
from tests.tiny_models import tiny_model

NEW = 20


class Fitted:
    """A model, its texts, and heads of each kind that have learnt some of them."""

    def __init__(self, kind: str) -> None:
        self.runner = Runner(tiny_model(kind, tie_word_embeddings=False))
        model = self.runner.model
        self.texts = [Text(p + naive_greedy(model, p, NEW), len(p)) for p in PROMPTS]
        tokens = [text.tokens for text in self.texts[:2]]
        self.medusa = medusa_heads.fitted_heads(model, tokens, steps=4)
        self.hydra = hydra_heads.fitted_heads(model, tokens, prefix=False)
        self.prefix = hydra_heads.fitted_heads(model, tokens, prefix=True)
        self.eagle = eagle_heads.eagle_draft(self.runner, eagle_heads.fitted_head("eagle", model, tokens))

    def drafter(self, heads: str, shape: TreeShape) -> Drafter:
        """The strategy with these heads."""
        if heads == "medusa":
            return medusa(self.runner, self.medusa, shape)
        if heads == "eagle":
            return eagle_heads.drafting("eagle", self.runner, self.eagle, shape)
        return hydra_heads.hydra(self.runner, getattr(self, heads), shape)


FITTED = {kind: Fitted(kind) for kind in ("llama", "gemma2")}


def test_ranks_are_those_of_the_heads_asked_place_by_place() -> None:
    fitted = FITTED["llama"]
    drafter = cast(HeadsDrafter, fitted.drafter("medusa", CHAIN))
    for text in fitted.texts:
        found = text_ranks(drafter, text, Greedy())
        assert found.shape == (NEW, 4)
        assert found[:, 0].tolist() == [0] * NEW  # the model says its own text
        for place in range(NEW):
            best = naive_ranks(fitted.runner.model, fitted.medusa, text.tokens[: text.given + place + 1])
            for head in (1, 2, 3):
                there = text.given + place + head
                rank = best[head - 1].index(text.tokens[there]) if there < len(text.tokens) else MISSING
                assert found[place, head] == min(rank, TOP)


@pytest.mark.parametrize("shape", [CHAIN, WIDE], ids=["chain", "tree"])
@pytest.mark.parametrize("heads", ["medusa", "hydra", "prefix", "eagle"])
@pytest.mark.parametrize("kind", FITTED)
def test_what_ranks_foretell_is_what_decoding_wins(kind: str, heads: str, shape: TreeShape) -> None:
    """Greedily, and where tokens are drawn, which the rule then foresees at their places."""
    fitted = FITTED[kind]
    foretold = [tokens / steps for tokens, steps in checked_lengths(fitted, heads, shape, Greedy())]
    assert max(foretold) > 1.3  # some drafts are right, and not all
    assert min(foretold) < 4.0
    vocab = fitted.runner.vocab_size
    checked_lengths(fitted, heads, shape, Sampling(Shaping({"temperature": 0.9}, [], vocab), 5))


def checked_lengths(fitted: Fitted, heads: str, shape: TreeShape, rule: Rule) -> list[tuple[int, int]]:
    """Tokens and steps of every text as its ranks foretell them, which are those of decoding it."""
    drafter = fitted.drafter(heads, shape)
    rows = run(fitted.runner, drafter, PROMPTS, rule=rule)
    found = []
    for stream, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        text = Text(prompt + row.tokens, len(prompt), stream)
        ranks = text_ranks(cast(HeadsDrafter, drafter), text, rule)
        assert ranks[:, 0].tolist() == [0] * len(row.tokens)
        needed = accepted_drafts(ranks[:, 1:], shape.paths)
        found.append(decoded((needed <= shape.size).sum(dim=1).tolist()))
        assert found[-1] == (sum(row.accepted_lengths), len(row.accepted_lengths))
    return found


def test_a_short_text_has_no_token_for_later_heads() -> None:
    fitted = FITTED["llama"]
    drafter = cast(HeadsDrafter, fitted.drafter("hydra", CHAIN))
    found = text_ranks(drafter, Text([3, 4, 5, 6], given=2), Greedy())
    assert found[:, 1:].ne(MISSING).tolist() == [[True, False, False], [False, False, False]]
    assert text_ranks(drafter, Text([3, 4], given=1), Greedy()).shape == (1, 4)


def test_ranks_of_tokens_among_few_and_many() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab in (4, 30):
        logits = torch.randn(50, vocab, generator=generator)
        tokens = torch.randint(vocab, (50,), generator=generator)
        order = logits.argsort(dim=-1, descending=True).tolist()
        expected = [min(row.index(token), TOP) for row, token in zip(order, tokens.tolist(), strict=True)]
        assert ranks_of(logits, tokens).tolist() == expected


def test_each_accuracy_is_over_its_own_count() -> None:
    ranks = torch.tensor([[0, 0], [0, 2], [0, TOP], [1, MISSING]])
    lm_head, head = accuracies([ranks[:1], ranks[1:]])
    assert (lm_head.head, lm_head.count, lm_head.top[1], lm_head.top[3]) == (0, 4, 0.75, 1.0)
    assert (head.head, head.count) == (1, 3)
    assert head.top == pytest.approx({1: 1 / 3, 3: 2 / 3, 5: 2 / 3, 10: 2 / 3})


def test_prompts_are_continued_greedily_up_to_their_end(tiny_target: Target) -> None:
    texts = ["def anna_1(value):\n", "def bert", "    return value"] * 3 + ["x" * 300]
    prompts = [Prompt(i, f"{i}", tiny_target.encode(text)) for i, text in enumerate(texts)]
    found = continued(tiny_target, prompts, 9)
    assert len(found) == 9  # the last prompt is longer than the context
    for prompt, text in zip(prompts, found, strict=False):
        assert text.tokens[: text.given] == prompt.tokens
        written = naive_greedy(tiny_target.model, prompt.tokens, 9)
        ends = [at for at, token in enumerate(written, 1) if token in tiny_target.eos_token_ids]
        assert text.tokens[text.given :] == written[: min(ends, default=9)]
    with pytest.raises(UserError, match="the model's context is 128"):
        continued(tiny_target, [replace(prompts[-1], index=0)], 9)
