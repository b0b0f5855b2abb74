"""What a model is asked so that it writes training data: texts to continue, and conversations turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, Protocol

from layerskip_model.chat import Messages

Request = dict[str, Any]  # {"prompt": a text to continue}, or {"messages": a conversation to answer}


class Unanswerable(ValueError):
    """Why there is no answer, or none to learn from: a phrase, by which such rows are counted."""


@dataclass(frozen=True)
class Answer:
    """What was written. `finish_reason`: eos or stop; length or context where it was cut. `tokens`: how many."""

    text: str
    finish_reason: str
    tokens: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether it ended by itself."""
        return self.finish_reason in ("eos", "stop")


class Question(Protocol):
    """A row of the data set. It is asked until it has nothing more to ask, and becomes a row to train on."""

    @property
    def name(self) -> str:
        """Where it is from, FILE:LINE or the like."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """How many answers it wants, and the characters before the first."""
        ...

    def request(self, answers: Sequence[Answer]) -> Request | None:
        """What is asked after these answers; None where it has enough. Raises Unanswerable before the first."""
        ...

    def row(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The row to train on. Raises Unanswerable where there is nothing to learn in it."""
        ...


@dataclass(frozen=True)
class Continuation:
    """A text to continue: a row with prompt, response and finish_reason. A continuation may be cut."""

    name: str
    prompt: str

    @property
    def size(self) -> tuple[int, int]:
        """One answer."""
        return 1, len(self.prompt)

    def request(self, answers: Sequence[Answer]) -> Request | None:
        """The prompt, once."""
        if not self.prompt.strip():
            raise Unanswerable("the prompt is empty")
        return None if answers else {"prompt": self.prompt}

    def row(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The prompt with its continuation."""
        (answer,) = answers
        if not answer.text.strip():
            raise Unanswerable("the answer is empty")
        return {
            "prompt": self.prompt,
            "response": answer.text,
            "finish_reason": answer.finish_reason,
            "document": self.name,
        }


@dataclass(frozen=True)
class Talk:
    """A conversation, each of whose answers is written anew, after the new ones before it: a row with messages.

    A template puts the end of a turn after every answer, and so would teach an end where an answer was cut: the row has
    the turns before that. An empty answer ends it as well. A first message of the assistant's is left out: it
    answers nothing. A last question without an answer gets one.
    """

    name: str
    messages: Messages

    @cached_property
    def questions(self) -> list[Messages]:
        """The messages before each answer that is wanted, less those before the answer before."""
        found: list[Messages] = [[]]
        for message in self.messages:
            if message["role"] != "assistant":
                found[-1].append(message)
            elif _asks(found[-1]):
                found.append([])
        return [messages for messages in found if _asks(messages)]

    @property
    def size(self) -> tuple[int, int]:
        """The number of questions."""
        said = self.questions[0] if self.questions else []
        return len(self.questions), sum(len(str(message.get("content"))) for message in said)

    def request(self, answers: Sequence[Answer]) -> Request | None:
        """The conversation up to the next answer."""
        if any(
            message["role"] in ("tool", "function") or "tool_calls" in message for message in self.messages
        ):
            raise Unanswerable("it has results of tools, which the new answers would not have asked for")
        if not self.questions:
            raise Unanswerable("nobody asks anything")
        if len(answers) == len(self.questions) or (answers and not _ends_well(answers[-1])):
            return None
        return {"messages": [*self._so_far(answers), *self.questions[len(answers)]]}

    def row(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The conversation as far as its answers are whole."""
        kept = list(takewhile(_ends_well, answers))
        if not kept:
            raise Unanswerable("the answer is empty" if answers[0].is_whole else "the first answer was cut")
        return {"messages": self._so_far(kept), "document": self.name}

    def _so_far(self, answers: Sequence[Answer]) -> Messages:
        """Questions and their answers. The white space around these is the template's to write."""
        turns = zip(self.questions, answers, strict=False)
        said = [[*asked, {"role": "assistant", "content": answer.text.strip()}] for asked, answer in turns]
        return [message for turn in said for message in turn]


def _asks(messages: Messages) -> bool:
    return any(message["role"] == "user" for message in messages)


def _ends_well(answer: Answer) -> bool:
    return answer.is_whole and bool(answer.text.strip())


def question_of(name: str, asked: str | Messages) -> Question:
    """A text to continue, or a conversation to answer."""
    return Continuation(name, asked) if isinstance(asked, str) else Talk(name, asked)
