"""One small tokenizer of each kind that decodes in a way of its own."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def byte_level() -> PreTrainedTokenizerBase:
    """As GPT-2 and Llama 3 have it: any bytes make a token."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate([*names, "Ġa", "Ã©"])}, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer)


def byte_fallback() -> PreTrainedTokenizerBase:
    """As Llama 2 has it: a space is stripped at the start, and rare characters are runs of byte tokens."""
    names = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁a",
        "▁▁",
        "a",
        "b",
        "é",
        ".",
        "\ufffd",
    ]
    model = models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return wrapped(tokenizer)


def word_pieces() -> PreTrainedTokenizerBase:
    """As BERT has it: spaces between all tokens but those that go on."""
    names = ["[UNK]", "a", "##a", "b", "##b", ".", "é", "##é", "漢"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return wrapped(tokenizer)


TOKENIZERS = {"bytes": byte_level(), "fallback": byte_fallback(), "words": word_pieces()}


def tokens_named(tokenizer: PreTrainedTokenizerBase, *names: str) -> list[int]:
    """The ids of tokens by name."""
    return [tokenizer.get_vocab()[name] for name in names]
