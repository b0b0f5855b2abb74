from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

import train.data.encoding as encoding
from layerskip_model.errors import UserError
from tests.chats import PLAIN, SPACED, THINKING, UNSTABLE, byte_tokenizer, talk
from tests.train.data_files import write_jsonl
from train.data.encoding import Encoded, check_data, encoder_for
from train.data.examples import Conversation, Document, Pair, Tolerance
from train.data.sources import DataConfig
from train.data.tokenizer import train_tokenizer

TEXTS = ["one é\n", " two", "<|im_end|>"]
FORMS: dict[str, dict[str, Any]] = {
    "text": {},
    "pair": {"pair": {"prompt": "q", "response": "a"}},
    "talk": {"conversation": "m"},
}


def encode(
    tokenizer: PreTrainedTokenizerBase, form: str, documents: list[Any], tolerance: int = 0
) -> list[Encoded]:
    config = DataConfig.model_validate({"train": [{"kind": "jsonl", "files": ["a"], **FORMS[form]}]})
    return list(encoder_for(config.train[0], tokenizer, config, Tolerance(tolerance))(documents))


@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_texts_begin_and_end_as_the_tokenizer_has_it(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", batch)
    documents = [Document(f"{i}", text) for i, text in enumerate(TEXTS)]
    sizes = [len(text.encode()) for text in TEXTS]
    trained = train_tokenizer(["some text"], 260)
    for tokenizer, before, after in (
        (trained, ["<|endoftext|>"], []),  # one token for both: the next document's begin is the end
        (byte_tokenizer(begins=True), ["<s>"], ["</s>"]),
        (byte_tokenizer(), ["</s>"], []),  # it puts no <s> by itself
    ):
        for text, found in zip(TEXTS, encode(tokenizer, "text", documents), strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            begin, end = (tokenizer.convert_tokens_to_ids(names) for names in (before, after))
            assert found.ids == begin + ids + end
            assert found.counted is None
        assert [found.bytes for found in encode(tokenizer, "text", documents)] == sizes


@pytest.mark.parametrize("begins", [True, False])
def test_pairs_are_tokenised_apart_as_for_generation(begins: bool) -> None:
    tokenizer = byte_tokenizer(("a", "b"), begins=begins)
    pairs = [Pair("x", "question a", "b é"), Pair("y", "a", "bb")]
    for pair, found in zip(pairs, encode(tokenizer, "pair", pairs), strict=True):
        prompt = tokenizer(pair.prompt)["input_ids"]  # as eval's Target.encode
        response = [*tokenizer(pair.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert found == Encoded(
            prompt + response,
            [False] * len(prompt) + [True] * len(response),
            len(pair.response.encode()),
        )


def test_conversations_go_through_the_template(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer(template=THINKING)
    dropped = talk("hi", "yo", "so?", "né")
    dropped[1]["thinking"] = "hm"
    documents = [Conversation("a", talk("hi", "yo")), Conversation("b", dropped)]
    found = encode(tokenizer, "talk", documents)
    assert [encoded.bytes for encoded in found] == [2, len("<think>hm</think>yo"), 3]
    for encoded in found:
        assert encoded.counted is not None
        assert len(encoded.counted) == len(encoded.ids)
        assert not encoded.counted[0]
    refused = [Conversation("a.jsonl:7", talk("hi", "yo"))]
    unstable = byte_tokenizer(template=UNSTABLE)
    with pytest.raises(UserError, match=r"^a\.jsonl:7: the chat template writes the prompt"):
        encode(unstable, "talk", refused)
    assert encode(unstable, "talk", refused, tolerance=1) == []
    assert "passed over malformed row 1 of at most 1: a.jsonl:7" in capsys.readouterr().err
    spaced = byte_tokenizer(("Ġ", "a"), template=SPACED)  # refuses answers that begin with an a
    talks = [talk("hi", "yo"), talk("hi", "a"), talk("hi", "a", "so?", "no"), [{"role": "x"}], talk("a", "b")]
    together = encode(spaced, "talk", [Conversation(f"{i}", t) for i, t in enumerate(talks)], tolerance=2)
    alone = [encode(spaced, "talk", [Conversation("a", talks[i])]) for i in (0, 2, 4)]
    assert [[found] for found in together] == alone


def test_the_recipe_names_the_template(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(PLAIN)
    rows = write_jsonl(tmp_path / "a.jsonl", [{"m": talk("hi", "yo")}])
    section = {"kind": "jsonl", "files": [str(rows)], "conversation": "m"}
    bare = DataConfig.model_validate({"train": [section]})
    named = DataConfig.model_validate({"train": [section], "chat_template": str(path)})
    (source,) = bare.train
    with pytest.raises(UserError, match=r"has no chat template.*data\.chat_template"):
        encoder_for(source, byte_tokenizer(), bare)
    encoder = encoder_for(source, byte_tokenizer(), named)
    assert encoder.rules == PLAIN
    assert encoder.rules != encoder_for(source, byte_tokenizer(template=THINKING), bare).rules
    (found,) = encoder(source.documents())
    check_data(named, byte_tokenizer())
    check_data(named, None)
    for tokenizer, reason in (
        (byte_tokenizer(), "has no chat template"),
        (None, "a new tokenizer has no chat"),
    ):
        with pytest.raises(UserError, match=reason):
            check_data(bare, tokenizer)
    with pytest.raises(UserError, match=r"^.*a\.jsonl:1: the chat template writes the prompt"):
        check_data(bare, byte_tokenizer(template=UNSTABLE))
    assert byte_tokenizer().decode(found.ids) == "<s>USER: hi ASSISTANT: yo</s>"
