"""Text that the model wrote itself, and what drafts would have been accepted in it.

Greedy self-speculation writes what the last layer alone would, so while drafts are accepted their prefix is that
text: whether exit E's first choice after each prefix is the text's next token decides the acceptance of every
exit and every number of drafts, exactly. One forward over a text replaces a decode for each pair of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from eval.decoding.cache import Cache, SpanView
from eval.decoding.drafters.base import Drafter
from eval.decoding.speculate import Generation, decode
from layerskip_model.runner import Runner


def continued(
    runner: Runner,
    drafter: Drafter,
    prompts: list[list[int]],
    new_tokens: int,
    eos_token_ids: Collection[int],
) -> list[Generation]:
    """Decode greedily, in one batch where the model's attention allows. Raises UserError."""
    batches = [prompts] if runner.takes_masks else [[prompt] for prompt in prompts]
    return [
        generation
        for batch in batches
        for generation in decode(
            runner, drafter, batch, max_new_tokens=new_tokens, eos_token_ids=eos_token_ids
        )
    ]


@dataclass(frozen=True)
class OwnText:
    """Prompts and what the runner's model wrote after them, greedily, up to a limit or to an end of its own."""

    runner: Runner
    prompts: list[list[int]]
    texts: list[list[int]]  # without the prompts
    ended: list[bool]  # by itself
    eos_token_ids: Collection[int] = ()

    def decoded(self, drafter: Drafter) -> list[Generation]:
        """The same once more, with drafts. Raises UserError."""
        longest = max(map(len, self.texts))
        return continued(self.runner, drafter, self.prompts, longest, self.eos_token_ids)

    @torch.inference_mode()
    def agreement(self) -> dict[int, list[list[bool]]]:
        """Exit E below the last -> for each text, whether the exit would choose each of its tokens.

        The first token is left out, as it comes with the prompt's own forward.
        """
        runner = self.runner
        agreed: dict[int, list[list[bool]]] = {exit_layer: [] for exit_layer in range(1, runner.num_layers)}
        for prompt, text in zip(self.prompts, self.texts, strict=True):
            tokens = torch.tensor([prompt + text], device=runner.device)
            length = tokens.shape[1] - 1
            context = runner.span(
                SpanView(Cache(1, runner.num_layers, length), 0, length),
                runner.tables(length, length),
                0,
                length,
            )
            hidden = runner.embed(tokens[:, :-1])
            for layer in range(runner.num_layers - 1):
                hidden = runner.run(hidden, layer, layer + 1, context)  # [1, length, hidden]
                chosen = runner.logits(hidden[0, len(prompt) :]).argmax(-1)  # [text - 1]
                agreed[layer + 1].append((chosen == tokens[0, len(prompt) + 1 :]).tolist())
        return agreed


def mean_accepted(agreed: Sequence[Sequence[bool]], ended: Sequence[bool], drafts: int) -> float:
    """m: drafts accepted a round, when each round drafts `drafts` tokens of texts with this agreement.

    A round keeps the drafts up to the first that differs, and the last layer's own token after them. In a text
    that ended by itself drafts beyond its end are lost; elsewhere rounds that the limit cuts short don't count,
    unless there are no others.
    """
    rounds = accepted = 0
    for text, is_whole in zip(agreed, ended, strict=True):
        position = 0
        while position < len(text) and (is_whole or position + drafts <= len(text) or rounds == 0):
            following = [*text[position : position + drafts], False]
            won = following.index(False)
            rounds, accepted, position = rounds + 1, accepted + won, position + won + 1
    return accepted / rounds if rounds else 0.0
