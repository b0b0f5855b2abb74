"""What the tests of drafting with a second model share."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from eval.decoding.drafters.speculative_sampling import DraftModel
from layerskip_model.runner import Runner
from tests.eval.decoding.test_speculate import naive_greedy


def first_layers(model: PreTrainedModel, count: int, *, vocabulary: int | None = None) -> PreTrainedModel:
    """A copy with the first layers only, and with more or fewer tokens at the end of its vocabulary."""
    shallow = copy.deepcopy(model)
    del shallow.get_decoder().layers[count:]
    shallow.config.num_hidden_layers = count
    if vocabulary is not None:
        shallow.resize_token_embeddings(vocabulary, mean_resizing=False)
    return shallow


def draft_of(model: PreTrainedModel, count: int, *, vocabulary: int | None = None) -> DraftModel:
    """Those layers as a draft model."""
    return DraftModel("first layers", Runner(first_layers(model, count, vocabulary=vocabulary)))


def naive_lengths(draft: DraftModel, prompt: list[int], future: list[int], drafts: int) -> list[int]:
    """How many tokens each step of greedy speculative sampling wins until the text is prompt and future.

    By a draft model that reads the whole text anew for every draft.
    """
    done, lengths = 1, []
    while done < len(future):
        text = prompt + future[:done]
        reach = draft.runner.context_length - (len(text) - 1)  # a draft comes from the place before its own
        count = max(0, min(drafts, len(future) - done - 1, reach))
        tokens = naive_greedy(draft.runner.model, text, count)
        right = [token == wanted for token, wanted in zip(tokens, future[done:], strict=False)]
        lengths.append(1 + [*right, False].index(False))
        done += lengths[-1]
    return lengths
