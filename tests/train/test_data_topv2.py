from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_model.errors import UserError
from train.data.examples import Pair, Tolerance
from train.data.topv2 import Node, TopV2Source, as_json, parse_tree

PARIS = "[IN:GET_WEATHER weather in [SL:LOCATION Paris ] ]"
NESTED = (
    "[IN:CREATE_REMINDER remind me to [SL:TODO [IN:CALL call [SL:CONTACT Ann Lee ] ] ] [SL:DATE_TIME now ] ]"
)
HEADER = "domain\tutterance\tsemantic_parse\n"


def source(path: Path, **settings: Any) -> TopV2Source:
    return TopV2Source.model_validate({"kind": "topv2", "files": [str(path)], **settings})


def test_both_forms(tmp_path: Path) -> None:
    path = tmp_path / "weather_train.tsv"
    path.write_text(f"{HEADER}weather\tweather in Paris\t{PARIS}\n")
    asked = "weather in Paris\n"
    assert list(source(path).documents()) == [Pair(f"{path}:2", asked, PARIS)]
    answer = '{"intent": "GET_WEATHER", "slots": [{"name": "LOCATION", "value": "Paris"}]}'
    assert list(source(path, form="json").documents()) == [Pair(f"{path}:2", asked, answer)]
    assert source(path).whole
    assert source(path).fingerprint() != source(path, form="json").fingerprint()


def test_json_of_nested_trees() -> None:
    call = {"intent": "CALL", "slots": [{"name": "CONTACT", "value": "Ann Lee"}]}
    slots: list[dict[str, Any]] = [{"name": "TODO", "value": call}, {"name": "DATE_TIME", "value": "now"}]
    assert as_json(parse_tree(NESTED)) == {"intent": "CREATE_REMINDER", "slots": slots}
    mixed = parse_tree("[IN:A [SL:B please now [IN:C ] then ] [SL:D ] ]")
    assert as_json(mixed)["slots"] == [
        {"name": "B", "value": ["please now", {"intent": "C", "slots": []}, "then"]},
        {"name": "D", "value": ""},
    ]


def bracketed(node: Node | str) -> str:
    """The twin of the parser: the text of a tree."""
    if isinstance(node, str):
        return node
    return " ".join([f"[{node.kind}:{node.name}", *map(bracketed, node.children), "]"])


names, words = st.sampled_from(["GET_IT", "A", "B2"]), st.sampled_from(["a", "6:30", "it's", "[", "é"])
intents: st.SearchStrategy[Node] = st.deferred(
    lambda: st.builds(Node, st.just("IN"), names, st.lists(words | slots, max_size=3))
)
slots: st.SearchStrategy[Node] = st.deferred(
    lambda: st.builds(Node, st.just("SL"), names, st.lists(words | intents, max_size=2))
)


@settings(max_examples=100, deadline=None)
@given(intents)
def test_a_tree_comes_back_from_its_text(tree: Node) -> None:
    assert parse_tree(bracketed(tree)) == tree
    json.dumps(as_json(tree))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("[IN:A", "lacks 1 closing brackets"),
        ("[IN:A [SL:B x ]", "lacks 1 closing brackets"),
        ("[IN:A ] ]", "goes on after its end with ']'"),
        ("weather [IN:A ]", "begins with 'weather'"),
        ("[SL:A x ]", r"has '\[SL:A' outermost"),
        ("[IN:A [IN:B ] ]", r"has '\[IN:B' directly in 'A'"),
    ],
)
def test_malformed_trees(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_tree(text)


def test_malformed_rows_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(f"{HEADER}d\tone\t[IN:A ]\nd\ttwo\nd\tthree\t[IN:A\nd\t\t[IN:A ]\nd\tfour\t[IN:A ]\n")
    found = list(source(path, form="json").documents(Tolerance(3)))
    assert [document.name for document in found] == [f"{path}:2", f"{path}:6"]
    told = capsys.readouterr().err.splitlines()
    for line, reason in zip(
        told, ("3: 2 columns, ", "4: semantic_parse lacks", "5: the prompt"), strict=True
    ):
        assert f"{path}:{reason}" in line
    path.write_text("utterance\tparse\nx\ty\n")
    with pytest.raises(UserError, match=r"a\.tsv: its first line names no columns .*'parse'\]"):
        list(source(path).documents())
    path.write_text(HEADER)
    with pytest.raises(UserError, match="has no rows"):
        list(source(path).documents())
