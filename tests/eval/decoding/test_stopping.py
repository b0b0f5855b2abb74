"""Stop strings, wherever token borders fall."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval.decoding.stopping import StopStrings
from layerskip_model.errors import UserError


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that joins some letters and leaves others to several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a stop, b stop and stopping\n\ndef f():\n"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


TOKENIZER = byte_tokenizer()


def first_end(stop: StopStrings, tokens: list[int]) -> int | None:
    return next((end for end in range(1, len(tokens) + 1) if stop(tokens[:end])), None)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="astop \n,é", max_size=40), st.sampled_from(["stop", "\n\n", " s", "é", "p, a"]))
def test_ends_where_the_whole_text_first_contains_it(text: str, string: str) -> None:
    tokens = TOKENIZER.encode(text)
    naive = [end for end in range(1, len(tokens) + 1) if string in TOKENIZER.decode(tokens[:end])]
    assert first_end(StopStrings(TOKENIZER, [string]), tokens) == (naive[0] if naive else None)


def test_a_string_over_several_tokens_ends_with_the_last_of_them() -> None:
    tokens = [piece for letter in "xx<e>é!" for piece in TOKENIZER.encode(letter)]
    assert first_end(StopStrings(TOKENIZER, ["never", "<e>é"]), tokens) == 7  # the second byte of é
    assert first_end(StopStrings(TOKENIZER, ["<end>"]), [*tokens, TOKENIZER.eos_token_id]) == 9


def test_an_empty_string_is_refused() -> None:
    with pytest.raises(UserError, match="stop string ''"):
        StopStrings(TOKENIZER, ["a", ""])
