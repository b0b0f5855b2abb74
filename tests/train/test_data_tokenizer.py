from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from layerskip_model.errors import UserError
from train.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer

TEXTS = [f"class A{i}:\n    def f(self, x={i}):\n        return self.value + {i * 7}\n\n" for i in range(50)]
SAMPLE = "  foo_bar\tdon't . , <|endoftext|> é\r\n\n        return 漢字1234567 \x00 "


@cache
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 320)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return trained()


def test_size_and_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 320
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.eos_token == "<|endoftext|>"
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 1)
    assert tokenizer.encode("") == []
    assert not {0, 1} & set(tokenizer.encode(TEXTS[0]))
    assert "token_type_ids" not in tokenizer("x")  # generate() would refuse them


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet=" \n\t\r'.,!_0ab\u00a0\u200b\u0301"))
def test_any_text_round_trips(text: str) -> None:
    assert trained().decode(trained().encode(text)) == text


def test_an_indentation_is_one_token_and_words_stay_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("\n        return self"))
    assert tokens == ["ĊĠĠĠĠĠĠĠ", "Ġreturn", "Ġself"]


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(iter(TEXTS), 320)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_survives_saving_and_loading(tmp_path: Path, beside_a_model: bool) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(tmp_path)
    if beside_a_model:  # AutoTokenizer looks at the model's type
        LlamaConfig().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    for name in ("model_max_length", "bos_token_id", "eos_token_id", "pad_token_id", "model_input_names"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.encode(SAMPLE) == tokenizer.encode(SAMPLE)
    assert loaded.decode(loaded.encode(SAMPLE)) == SAMPLE


@pytest.mark.parametrize(
    "section",
    [{}, {"train": {"vocab_size": 300}, "name_or_path": "x"}, {"train": {"vocab_size": 257}}],
)
def test_a_bad_section_is_refused(section: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TokenizerConfig.model_validate(section)


def test_a_missing_tokenizer_and_one_without_eos_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tokenizer\.name_or_path='.*nowhere' cannot be loaded: [^\n]*$"):
        load_tokenizer(str(tmp_path / "nowhere"))
    tokenizer = train_tokenizer(TEXTS, 300)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no eos_token"):
        load_tokenizer(str(tmp_path))
