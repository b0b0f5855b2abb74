"""What is trained on, one at a time: a text, a prompt with its response, a conversation; and rows that are none."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerskip_model.errors import UserError


@dataclass(frozen=True)
class Document:
    """One text. `name` is the same on every run: a relative path, or FILE:LINE."""

    name: str
    text: str


@dataclass(frozen=True)
class Pair(Document):
    """A prompt and the response to it, of which only the response is learnt; `text` is the one after the other.

    `ended`: the response is whole, so that its end is learnt too.
    """

    text: str = field(init=False)
    prompt: str
    response: str
    ended: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self.prompt + self.response)


@dataclass(frozen=True)
class Conversation(Document):
    """Messages {"role", "content", ...}, of which only the assistant's are learnt; `text` is what all of them say."""

    text: str = field(init=False)
    messages: list[dict[str, Any]]

    def __post_init__(self) -> None:
        said = (message.get("content") for message in self.messages)
        object.__setattr__(self, "text", "\n".join(text for text in said if isinstance(text, str)))


class MalformedRow(UserError):
    """A row that cannot be trained on; the message begins with its FILE:LINE."""


class Tolerance:
    """Passes over up to `limit` malformed rows in all, each said once on standard error; one more is an error.

    All readers of a run share one, since the limit is for all of them together. A row that is read twice counts once.
    A `quiet` one, for a first look, says nothing.
    """

    def __init__(self, limit: int = 0, passed: Iterable[str] = (), *, quiet: bool = False) -> None:
        self.limit, self.quiet = limit, quiet
        self.passed = list(passed)  # their messages

    def __call__(self, error: MalformedRow) -> None:
        """Pass over one row. Raises UserError, FILE:LINE first, where that is one too many."""
        if str(error) in self.passed:
            return
        if len(self.passed) >= self.limit:
            raise UserError(
                f"{error} (to pass over such rows set data.skip_malformed, now {self.limit}, to how many at most)"
            ) from error
        self.passed.append(str(error))
        if not self.quiet:
            count = f"{len(self.passed)} of at most {self.limit}"
            print(f"passed over malformed row {count}: {error}", file=sys.stderr)


def text_of(row: Mapping[str, Any], key: str, name: str, setting: str) -> str:
    """The text under a key. Raises MalformedRow, naming the recipe's `setting`, for anything else that is there."""
    if key not in row:
        raise MalformedRow(f"{name}: no field '{key}'; the row has {sorted(row)}: set '{setting}' to one")
    text = row[key]
    if not isinstance(text, str):
        raise MalformedRow(f"{name}: field '{key}' is {text!r:.40}; it must be a string")
    return text


def pair_of(prompt: str, response: str, name: str, *, ended: bool = True) -> Pair:
    """A pair. Raises MalformedRow where one of the two is empty."""
    for text, what in ((prompt, "prompt"), (response, "response")):
        if not text.strip():
            raise MalformedRow(f"{name}: the {what} is empty; fill it in or remove the row")
    return Pair(name, prompt, response, ended)


def is_whole(row: Mapping[str, Any]) -> bool:
    """Whether the answer in a row ended by itself; a limit of tokens or of the context may have cut it."""
    return row.get("finish_reason") not in ("length", "context")


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # others are called alike in both spellings
_SAID = ("content", "tool_calls")


def conversation_of(row: Mapping[str, Any], key: str, name: str) -> Conversation:
    """The conversation under a key (see `messages_of`).

    Raises MalformedRow for anything else and where the assistant says nothing.
    """
    messages = messages_of(row, key, name)
    if not any(m["role"] == "assistant" and any(m.get(said) for said in _SAID) for m in messages):
        raise MalformedRow(f"{name}: a conversation without an answer; it needs a message of the assistant")
    return Conversation(name, messages)


def messages_of(row: Mapping[str, Any], key: str, name: str) -> list[dict[str, Any]]:
    """The messages under a key: a list of {"role", "content"} or, as ShareGPT spells it, {"from", "value"}.

    Other keys of a message (tool calls, thinking) are kept for the template, less those that are null: tables
    have every key in every row. Raises MalformedRow for anything else.
    """
    if key not in row:
        raise MalformedRow(f"{name}: no field '{key}'; the row has {sorted(row)}: set 'conversation' to one")
    given = row[key]
    if not isinstance(given, list) or not given:
        raise MalformedRow(f"{name}: field '{key}' is {given!r:.40}; it must be a list of messages")
    return [_message(message, name, number) for number, message in enumerate(given, start=1)]


def _message(given: Any, name: str, number: int) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise MalformedRow(f"{name}: message {number} is {given!r:.40}; it must have a role and a content")
    message = {str(key): value for key, value in given.items() if value is not None}
    if "role" not in message and "from" in message and "value" in message:
        role = message.pop("from")
        message = {"role": _SHAREGPT_ROLES.get(role, role), "content": message.pop("value"), **message}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise MalformedRow(f"{name}: message {number} has no role; its keys are {sorted(message)}")
    if not isinstance(content, str | list) and not message.get("tool_calls"):
        raise MalformedRow(
            f"{name}: message {number} ('{role}') has content {content!r:.40}; it must be a string"
        )
    return message
