"""What a model is asked: every form of a row, a recipe's training data; and how cut answers are learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerskip_model.errors import UserError
from tests.chats import byte_tokenizer, talk
from tests.train.data_files import write_jsonl
from tests.train.tiny_runs import recipe_values, write_recipe, write_text
from train.data.encoding import encoder_for
from train.data.examples import Conversation, Document
from train.data.questions import read_asked
from train.data.sources import DataConfig


def asked(tmp_path: Path, *rows: dict[str, Any]) -> list[Document]:
    return read_asked(str(write_jsonl(tmp_path / "rows.jsonl", list(rows)))).documents


SHAREGPT = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "old"}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": talk("one", "old"), "prompt": "one"}, talk("one", "old")),
        ({"conversations": SHAREGPT}, talk("one", "old")),
        ({"conversation": talk("one")}, talk("one")),
        ({"turns": ["one", "two"], "category": "maths"}, talk("one", "", "two", "")),
    ],
)
def test_conversations_of_every_spelling(row: dict[str, Any], messages: Any, tmp_path: Path) -> None:
    (found,) = asked(tmp_path, row)
    assert isinstance(found, Conversation)
    assert (found.name, found.messages) == ("rows.jsonl:1", messages)


def test_prompts_are_taken_whole_and_texts_are_cut_into_prompts(tmp_path: Path) -> None:
    rows = ({"prompt": "a\n", "response": "old"}, {"prompt": "b"})
    assert asked(tmp_path, *rows) == [Document("rows.jsonl:1", "a\n"), Document("rows.jsonl:2", "b")]
    text = "".join(f"line {n}\n" for n in range(500))  # 4 kB
    prompts = [document.text for document in asked(tmp_path, {"text": text})]
    assert len(prompts) == 3
    assert all(200 < len(prompt) < 300 and prompt in text for prompt in prompts)
    assert text.startswith(prompts[0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows.jsonl: no rows"),
        ([{"text ": "a"}], r"rows.jsonl:1: keys \['text '\]; a row needs one of messages, conversations"),
        ([{"prompt": "a"}, {"messages": talk("a")}], "rows.jsonl:2: no field 'prompt'"),
        ([{"messages": talk("a")}, {"prompt": "a"}], "rows.jsonl:2: no field 'messages'"),
        ([{"turns": "a"}], "rows.jsonl:1: 'turns' is 'a'"),
        ([{"prompt": "<s>a", "special_tokens": False}], "rows.jsonl:1: a prompt that a chat template wrote"),
    ],
)
def test_other_rows_are_refused(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        asked(tmp_path, *rows)


def test_a_recipe_asks_what_it_trains_on_and_nothing_that_it_holds_out(tmp_path: Path) -> None:
    write_text(tmp_path)
    values = recipe_values(tmp_path / "run", tmp_path)
    values["data"] = {"train": [{"kind": "text", "files": [f"{tmp_path}/*.txt"]}], "heldout": 0.3}
    found = read_asked(str(write_recipe(tmp_path / "recipe.yaml", values)))
    training = {document.name for document in found.documents}
    assert 0 < len(training) < 4  # of the files
    config = DataConfig.model_validate(values["data"])
    from train.data.examples import Tolerance
    from train.data.sources import heldout_limit, split_documents

    limit = heldout_limit(config, Tolerance())
    train, heldout = split_documents(config, limit, Tolerance())
    assert training == {document.name for document in train}
    assert training.isdisjoint({document.name for document in heldout})


def test_a_recipe_asks_its_conversations_by_its_template(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "talks.jsonl", [{"m": talk("one", "old")}, {"m": talk("two", "old")}])
    write_jsonl(tmp_path / "pairs.jsonl", [{"q": "one", "a": "old"}])
    values = recipe_values(tmp_path / "run", tmp_path)
    source = {"kind": "jsonl", "files": [f"{tmp_path}/talks.jsonl"], "conversation": "m"}
    values["data"] = {"train": [source], "heldout": [source], "chat_template": "a.jinja"}
    found = read_asked(str(write_recipe(tmp_path / "recipe.yaml", values)))
    assert found.chat_template == "a.jinja"
    assert found.has_conversations
    assert [len(document.messages) for document in found.documents if isinstance(document, Conversation)] == [
        2,
        2,
    ]
    pairs = {"kind": "jsonl", "files": [f"{tmp_path}/pairs.jsonl"], "pair": {"prompt": "q", "response": "a"}}
    values["data"] = {"train": [pairs], "heldout": [pairs]}
    assert [
        one.text for one in read_asked(str(write_recipe(tmp_path / "recipe.yaml", values))).documents
    ] == ["one"]
    values["data"] = {"train": [source | {"streaming": True}], "heldout": [source]}
    with pytest.raises(UserError, match=r"recipe.yaml: data.train\[0\] is a stream without an end"):
        read_asked(str(write_recipe(tmp_path / "recipe.yaml", values)))


@pytest.mark.parametrize(
    ("reason", "ends"), [(None, True), ("eos", True), ("stop", True), ("length", False), ("context", False)]
)
def test_a_response_that_was_cut_teaches_no_end(reason: str | None, ends: bool, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(begins=True)
    row = {"prompt": "a", "response": "bc"} | ({} if reason is None else {"finish_reason": reason})
    write_jsonl(tmp_path / "rows.jsonl", [row])
    source = {"kind": "jsonl", "files": [f"{tmp_path}/rows.jsonl"]}
    config = DataConfig.model_validate(
        {"train": [source | {"pair": {"prompt": "prompt", "response": "response"}}]}
    )
    (found,) = encoder_for(config.train[0], tokenizer, config)(config.train[0].documents())
    text = "<s>abc</s>" if ends else "<s>abc"
    assert found.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.counted == [False, False, *[True] * (len(found.ids) - 2)]
