"""What is asked, in which order, and what becomes of the answers."""

from __future__ import annotations

from typing import Any

import pytest

from eval.questions import Answer, Continuation, Talk, Unanswerable
from tests.chats import talk

SYSTEM = {"role": "system", "content": "Be kind."}


def whole(text: str) -> Answer:
    return Answer(text, "eos", 1)


def cut(text: str) -> Answer:
    return Answer(text, "length", 1)


def test_every_answer_is_asked_for_after_the_new_ones_before_it() -> None:
    asked = Talk("a:1", [SYSTEM, *talk("one", "old", "two", "old")])
    assert asked.size == (2, len("Be kind.one"))
    assert asked.request([]) == {"messages": [SYSTEM, *talk("one")]}
    assert asked.request([whole(" new ")]) == {"messages": [SYSTEM, *talk("one", "new", "two")]}
    both = [whole(" new "), whole("newer\n")]
    assert asked.request(both) is None
    assert asked.row(both) == {"messages": [SYSTEM, *talk("one", "new", "two", "newer")], "document": "a:1"}
    assert asked.messages[2]["content"] == "old"


@pytest.mark.parametrize(
    ("messages", "questions"),
    [
        (talk("one"), [talk("one")]),
        (talk("one", "old", "two"), [talk("one"), talk("two")]),
        ([*talk("", "hello")[1:], *talk("one", "old")], [talk("one")]),
        ([SYSTEM, *talk("", "hello")[1:], *talk("one", "old")], [[SYSTEM, *talk("one")]]),
        ([*talk("one", "old"), *talk("", "older")[1:], *talk("two")], [talk("one"), talk("two")]),
        ([*talk("one"), *talk("more", "old")], [[*talk("one"), *talk("more")]]),
        ([*talk("one", "old"), SYSTEM], [talk("one")]),
    ],
    ids=["no answer", "a last question", "begins with an answer", "system first", "twice", "two", "rest"],
)
def test_questions_are_what_stands_between_answers(messages: Any, questions: Any) -> None:
    assert Talk("", messages).questions == questions


@pytest.mark.parametrize("bad", [cut("half"), whole("  "), whole("")])
def test_a_conversation_ends_before_an_answer_that_cannot_be_learnt(bad: Answer) -> None:
    asked = Talk("a", talk("one", "old", "two", "old", "three", "old"))
    assert asked.request([whole("new"), bad]) is None
    assert asked.row([whole("new"), bad])["messages"] == talk("one", "new")
    assert asked.request([bad]) is None
    with pytest.raises(Unanswerable, match="was cut" if bad.text == "half" else "is empty"):
        asked.row([bad])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([SYSTEM], "nobody asks"),
        (talk("", "hello")[1:], "nobody asks"),
        ([*talk("one"), {"role": "assistant", "tool_calls": [{}]}], "tools"),
        ([*talk("one", "old"), {"role": "tool", "content": "3"}], "tools"),
    ],
)
def test_some_conversations_cannot_be_answered(messages: Any, reason: str) -> None:
    with pytest.raises(Unanswerable, match=reason):
        Talk("a", messages).request([])


def test_a_text_is_continued_once_and_says_whether_it_was_cut() -> None:
    asked = Continuation("a", "one ")
    assert asked.request([]) == {"prompt": "one "}
    assert asked.request([cut(" two ")]) is None
    row = {"prompt": "one ", "response": " two ", "finish_reason": "length", "document": "a"}
    assert asked.row([cut(" two ")]) == row
    with pytest.raises(Unanswerable, match="answer is empty"):
        asked.row([whole(" ")])
    with pytest.raises(Unanswerable, match="prompt is empty"):
        Continuation("a", " ").request([])
