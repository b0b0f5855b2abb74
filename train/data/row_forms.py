"""Rows with named fields as documents, pairs or conversations: the keys that say which, and the TOPv2 preset."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from train.data.examples import Document, conversation_of, is_whole, pair_of, text_of
from train.data.streams import SourceSection
from train.section import Section


class PairKeys(Section):
    """Which fields hold a prompt and the response to it; the loss is on the response only."""

    prompt: str = Field(min_length=1, description="The field with what the model is given.")
    response: str = Field(min_length=1, description="The field with what it shall answer.")


class RowForm(SourceSection):
    """Base of the sources whose rows have fields: at most one of `field`, `pair` and `conversation`."""

    field: str | None = Field(
        None,
        min_length=1,
        description="The field with the text; default: text, where there is no other form.",
    )
    pair: PairKeys | None = Field(None, description="Prompts with responses; the loss is on the responses.")
    conversation: str | None = Field(
        None,
        min_length=1,
        description="The field with a list of messages, {role, content} or {from, value}; they go through the chat "
        "template, and the loss is on the assistant's answers.",
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        forms = {name: getattr(self, name) for name in ("field", "pair", "conversation")}
        given = [name for name, value in forms.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]}: give one of 'field', 'pair' and 'conversation', not {given}")
        return self

    @property
    def whole(self) -> bool:
        """True for pairs and conversations."""
        return self.pair is not None or self.conversation is not None

    @property
    def columns(self) -> dict[str, str]:
        """The recipe's key for each field that is read."""
        if self.pair is not None:
            return {self.pair.prompt: "pair.prompt", self.pair.response: "pair.response"}
        if self.conversation is not None:
            return {self.conversation: "conversation"}
        return {self.field or "text": "field"}

    def document(self, name: str, row: Any) -> Document | None:
        """What a row's fields hold, None for an empty text. Raises MalformedRow."""
        if self.conversation is not None:
            return conversation_of(row, self.conversation, name)
        if self.pair is not None:
            prompt = text_of(row, self.pair.prompt, name, "pair.prompt")
            response = text_of(row, self.pair.response, name, "pair.response")
            return pair_of(prompt, response, name, ended=is_whole(row))
        text = text_of(row, self.field or "text", name, "field")
        return Document(name, text) if text.strip() else None
