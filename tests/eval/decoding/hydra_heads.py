"""What the tests of decoding with Hydra heads share: heads good and bad, and naive twins of what they draft."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import PreTrainedModel

from eval.decoding.drafters.base import Drafter
from eval.decoding.drafters.hydra import HydraDraft
from eval.decoding.static_tree import RanksPath, TreeShape
from eval.decoding.strategies import make_drafter
from layerskip_model.backbone import Backbone
from layerskip_model.hydra import HydraHeads
from layerskip_model.runner import Runner
from tests.layerskip_model.test_hydra import HEADS, naive_logits, new_heads


def hydra(runner: Runner, heads: HydraHeads, shape: TreeShape | None = None, **settings: int) -> Drafter:
    """The strategy with these heads, whose own tree is their chain."""
    draft = HydraDraft.of("heads", heads.requires_grad_(False).eval(), TreeShape.chain(heads.number), runner)
    return make_drafter("hydra", runner, draft=draft, tree=shape, **settings)


def fitted_heads(
    model: PreTrainedModel, texts: list[list[int]], *, prefix: bool, number: int = HEADS, steps: int = 4
) -> HydraHeads:
    """Heads that have learnt these texts, not all of them well: of their drafts some are right and some wrong."""
    backbone = Backbone(model)
    heads = new_heads(model, moved=False, heads=number, prefix_attention=prefix)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.03)
    for _ in range(steps):
        loss = torch.zeros((), dtype=torch.float64)
        for text in texts:
            tokens = torch.tensor([text])
            with torch.no_grad():
                states, embedded = backbone.final_states(tokens), backbone.embed(tokens)
            states = states if heads.prefix is None else heads.prefix(states)
            for index in range(number):
                ahead = index + 2
                path = embedded.unfold(1, index + 1, 1)[:, 1:-1].transpose(
                    2, 3
                )  # [1, places, index + 1, hidden]
                logits = heads.logits(index, states[:, :-ahead], path)
                loss = loss + F.cross_entropy(logits[0], tokens[0, ahead:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads


def naive_state(model: PreTrainedModel, heads: HydraHeads, text: list[int]) -> Tensor:
    """What the heads read where the text's last token is the root of a draft, [hidden]: made from all before it."""
    states = Backbone(model).final_states(torch.tensor([text[:-1]]))
    if heads.prefix is None:
        return states[0, -1]
    assert heads.prefix_norm is not None
    return heads.prefix_norm(heads.prefix(states))[0, -1]


def naive_paths(
    model: PreTrainedModel, heads: HydraHeads, text: list[int], shape: TreeShape, *, no_repeats: bool = False
) -> dict[RanksPath, list[int]]:
    """The tokens on the way to each node, drafted for each path by itself, one after another.

    `no_repeats`: none of the tokens before it."""
    backbone = Backbone(model)
    found = {}
    with torch.inference_mode():
        state = naive_state(model, heads, text)
        for path in shape.paths:
            tokens = [text[-1]]
            for index, rank in enumerate(path):
                logits = naive_logits(heads, index, state, list(backbone.embed(torch.tensor(tokens))), model)
                if no_repeats:
                    logits[[*text, *tokens]] = -torch.inf
                tokens.append(int(logits.argsort(descending=True)[rank]))
            found[path] = tokens[1:]
    return found


def naive_lengths(
    model: PreTrainedModel, heads: HydraHeads, shape: TreeShape, prompt: list[int], future: list[int]
) -> list[int]:
    """How many tokens each step wins until the text is prompt and future; its first token is the prefill's."""
    done, lengths = 1, []
    while done < len(future):
        most = len(future) - done - 1  # beside the target's own token
        paths = (
            naive_paths(model, heads, prompt + future[:done], shape.cut(depth=most)).values() if most else ()
        )
        right = [len(path) for path in paths if path == future[done : done + len(path)]]
        lengths.append(1 + max(right, default=0))
        done += lengths[-1]
    return lengths
