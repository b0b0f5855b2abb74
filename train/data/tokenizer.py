"""The tokenizer: a pretrained one, or a byte-level BPE trained on the training documents."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, model_validator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from layerskip_model.errors import UserError
from layerskip_model.formats import huggingface
from train.section import Section

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
_SMALLEST_VOCABULARY = 256 + 2  # every byte, and the two special tokens

# Identifiers stay whole words with the space before them, numbers fall into threes, and a run of white space
# is one piece (less its last space, which the next word takes), so that an indentation can be one token.
_PIECES = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


class TrainTokenizerConfig(Section):
    """A byte-level BPE trained on the training documents."""

    vocab_size: int = Field(
        default=2048,
        ge=_SMALLEST_VOCABULARY,
        description="Number of tokens at most, the 256 bytes and 2 special tokens included.",
    )


class TokenizerConfig(Section):
    """Exactly one of `train` and `name_or_path`."""

    train: TrainTokenizerConfig | None = Field(default=None, description="Train a new tokenizer.")
    name_or_path: str | None = Field(default=None, description="A tokenizer of the hub or a local folder.")

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizerConfig:
        if (self.train is None) == (self.name_or_path is None):
            raise ValueError("give exactly one of 'train' and 'name_or_path'")
        return self


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a pretrained tokenizer. Raises UserError if there is none, or if it has no end-of-text token."""
    try:
        tokenizer = huggingface.load_tokenizer(name_or_path)
    except UserError as error:
        reason = str(error).removeprefix(f"model '{name_or_path}'").lstrip(": ")
        raise UserError(f"tokenizer.name_or_path='{name_or_path}' cannot be loaded: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer.name_or_path='{name_or_path}' has no eos_token; give one that has")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens (fewer if the texts are too small for more).

    Any text comes back exactly from decode(encode(text)); encode() adds no special token. `<|endoftext|>` is
    bos and eos, `<|pad|>` is pad. The same texts in the same order give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
