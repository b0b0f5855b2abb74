"""What the tests of decoding with Medusa heads share: heads good and bad, and naive twins of what they draft."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from eval.decoding.drafters.base import Drafter
from eval.decoding.drafters.medusa import MedusaDraft
from eval.decoding.static_tree import TreeShape, checked_tree
from eval.decoding.strategies import make_drafter
from layerskip_model.backbone import Backbone
from layerskip_model.head_terms import HeadTerms
from layerskip_model.medusa import MedusaHeads
from layerskip_model.medusa_model import MedusaModel
from layerskip_model.runner import Runner
from layerskip_model.token_loss import IGNORE_INDEX
from tests.layerskip_model.test_medusa import naive_logits

WIDE = checked_tree(
    "wide", [[0], [1], [0, 0], [0, 1], [2], [1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 2], [0, 1, 0]]
)
"""Ten nodes of three levels, in no order; some without children come before some with."""
CHAIN = TreeShape.chain(3)


def random_heads(model: PreTrainedModel, number: int = 3, **settings: Any) -> MedusaHeads:
    """Heads of the model's dtype that have nothing to do with its text, each different."""
    heads = MedusaHeads.new(Backbone(model), heads=number, **{"layers": 1, "shared": False, **settings})
    generator = torch.Generator().manual_seed(3)
    for parameter in heads.to(model.dtype).parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=model.dtype)
    return heads.eval()


def fitted_heads(
    model: PreTrainedModel, texts: list[list[int]], number: int = 3, steps: int = 12
) -> MedusaHeads:
    """Heads that have learnt these texts, not all of them well: of their drafts some are right and some wrong."""
    heads = MedusaHeads.new(Backbone(model), heads=number, layers=1, shared=False).to(model.dtype)
    module = MedusaModel(model, heads, frozen=True).train()
    longest = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    counts = torch.tensor([len(text) for text in texts])[:, None]
    labels = tokens[:, 1:].masked_fill(torch.arange(1, longest) >= counts, IGNORE_INDEX)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.05)
    for _ in range(steps):
        terms = module(tokens[:, :-1], labels, [1.0] * (number + 1))
        assert isinstance(terms, HeadTerms)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    module.eval()
    return heads


def medusa(runner: Runner, heads: MedusaHeads, shape: TreeShape | None = None, **settings: Any) -> Drafter:
    """The strategy with these heads, whose own tree is their chain."""
    draft = MedusaDraft("heads", heads, heads.number, TreeShape.chain(heads.number))
    return make_drafter("medusa", runner, draft=draft, tree=shape, **settings)


def naive_ranks(model: PreTrainedModel, heads: MedusaHeads, text: list[int]) -> list[list[int]]:
    """Each head's tokens, the best first, where the text's last token is the root of the draft.

    They read the state that this token was predicted from: the one of the token before it.
    """
    with torch.inference_mode():
        hidden = model.get_decoder()(input_ids=torch.tensor([text[:-1]])).last_hidden_state[0, -1]
        every = [naive_logits(heads, index, hidden, model) for index in range(heads.number)]
    return [logits.argsort(descending=True).tolist() for logits in every]


def naive_tree(
    model: PreTrainedModel, heads: MedusaHeads, text: list[int], shape: TreeShape
) -> set[tuple[int, ...]]:
    """The tokens on the way to each node."""
    best = naive_ranks(model, heads, text)
    return {tuple(best[level][rank] for level, rank in enumerate(path)) for path in shape.paths}


def naive_lengths(
    model: PreTrainedModel, heads: MedusaHeads, shape: TreeShape, prompt: list[int], future: list[int]
) -> list[int]:
    """How many tokens each step wins until the text is prompt and future; its first token is the prefill's."""
    done, lengths = 1, []
    while done < len(future):
        most = len(future) - done - 1  # beside the target's own token
        paths = naive_tree(model, heads, prompt + future[:done], shape)
        right = [len(path) for path in paths if list(path) == future[done : done + len(path)]]
        lengths.append(1 + max([length for length in right if length <= most], default=0))
        done += lengths[-1]
    return lengths


def one_state(model: PreTrainedModel) -> PreTrainedModel:
    """The model made to have the same state after every text: all tokens look alike."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    embedding.weight.data[:] = embedding.weight.data[1].clone()
    return model
