"""A probe of an EAGLE head: tokens, and what the head said along them when it was exported.

Nothing fails where a head is told another layer's states, features one place off or another RoPE base: it only guesses
badly. So whoever loads a head has it say the same tokens again, and compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerskip_model.eagle import EagleHead, unrolled
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.eagle_model import FrozenTarget

LENGTH = 64  # tokens
STEPS = 2  # the first reads features, the others what the head made
Head = EagleHead | Eagle3Head


@dataclass(frozen=True)
class Probe:
    """What a head said.

    Attributes:
        tokens: drawn evenly from those that it can say. Text would do worse: what a model writes by itself soon
            repeats, and then a place more or less makes no difference.
        log_probs: of each step s and place t, the head's log-probability of token t + s + 2.
        dtype: the coarsest that was in it.
    """

    tokens: list[int]
    log_probs: list[list[float]]
    dtype: str


def is_in_one_place(module: nn.Module) -> bool:
    """Whether this process alone can run it: no parameter on the meta device or split over ranks."""
    return not any(p.is_meta or hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in module.parameters())


@torch.no_grad()
def take_probe(module: FrozenTarget[Any], dtype: torch.dtype) -> Probe:
    """By the forward that training runs, in evaluation mode; `dtype` is what the head is exported in."""
    head: Head = module.head
    tokens = _probe_tokens(head, module.backbone.vocab_size).to(module.backbone.head.weight.device)
    was_training = module.training
    module.eval()
    try:
        features, embedded = module.entering(tokens[None]), module.backbone.embed(tokens[None, 1:])
        log_probs = [step.tolist() for step in said(head, embedded, features[:, :-1], tokens)]
    finally:
        module.train(was_training)
    coarsest = max(dtype, module.model.dtype, key=lambda one: torch.finfo(one).eps)
    return Probe(tokens.tolist(), log_probs, str(coarsest).removeprefix("torch."))


def _probe_tokens(head: Head, vocab_size: int) -> Tensor:
    sayable = head.vocabulary.tokens().cpu() if isinstance(head, Eagle3Head) else torch.arange(vocab_size)
    return sayable[torch.randint(len(sayable), (LENGTH,), generator=torch.Generator().manual_seed(0))]


def said(head: Head, embedded: Tensor, features: Tensor, tokens: Tensor) -> Iterator[Tensor]:
    """What a head says along `tokens` [seq]: in each of STEPS, at each place t, log-probabilities of token t + s + 2.

    `embedded` and `features` [1, seq - 1, hidden] of all places but the last: the token after each, and itself. A token
    that is not in the head's vocabulary has -inf. Yields float32 [seq - 2 - s].
    """
    for step, output in enumerate(unrolled(head, embedded, features, None, STEPS)):
        following = tokens[step + 2 :]
        own = head.vocabulary.from_target(following) if isinstance(head, Eagle3Head) else following
        spoken = head.logits(output[0, : len(following)]).float().log_softmax(dim=-1)
        found = spoken.gather(1, own.to(spoken.device).clamp(min=0)[:, None]).squeeze(1)
        yield found.masked_fill(own.to(found.device) < 0, -torch.inf).cpu()


def distance(probe: Probe, steps: Sequence[Tensor]) -> float:
    """How far from a probe a head is that says `steps`: the mean difference over the spread of what was recorded."""
    recorded = torch.tensor([value for step in probe.log_probs for value in step])
    differences = (torch.cat(list(steps)) - recorded).abs()
    return float(differences.mean() / recorded.std())
