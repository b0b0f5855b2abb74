"""What a model is asked when it writes its own training data: a file's rows, or the training data of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip_model.errors import UserError
from layerskip_model.jsonl import read_rows
from train.data.examples import Conversation, Document, Pair, Tolerance, messages_of, text_of
from train.data.heldout import tile
from train.data.sources import DataConfig, heldout_limit, split_documents

FORMS = ("messages", "conversations", "conversation", "turns", "prompt", "text")
PIECE_BYTES, PROMPT_BYTES = 1500, 250  # as held-out texts are cut


@dataclass(frozen=True)
class Asked:
    """Conversations to be answered, or documents whose text is a prompt to be continued; and a recipe's template."""

    documents: list[Document]
    chat_template: str | None = None

    @property
    def has_conversations(self) -> bool:
        """Whether a chat template is needed."""
        return any(isinstance(document, Conversation) for document in self.documents)


def read_asked(dataset: str) -> Asked:
    """The prompts of a recipe's training data (a .yaml file; nothing that is held out), or of a file of JSON lines.

    A line has one of the keys FORMS, as the first line: a conversation, the user's `turns` of one, a `prompt`, or a
    `text` that is cut into prompts as held-out texts are. Raises UserError.
    """
    if Path(dataset).suffix in (".yaml", ".yml"):
        from train.config import parse_recipe
        from train.recipe_file import read_recipe_file

        config = parse_recipe(read_recipe_file(dataset), origin=dataset).data
        return Asked(list(_of_recipe(config, dataset)), config.chat_template)
    rows = list(read_rows(dataset))
    if not rows:
        raise UserError(f'{dataset}: no rows; write one JSON object a line, such as {{"prompt": "..."}}')
    form = _form(rows[0][1], f"{dataset}:{rows[0][0]}")
    name = Path(dataset).name
    return Asked([one for line, row in rows for one in _of_row(row, form, f"{name}:{line}")])


def _of_recipe(config: DataConfig, origin: str) -> Iterator[Document]:
    for number, source in enumerate(config.train):
        if source.streaming and source.limit is None:
            raise UserError(f"{origin}: data.train[{number}] is a stream without an end; give it a 'limit'")
    tolerance = Tolerance(config.skip_malformed)
    training, _ = split_documents(config, heldout_limit(config, tolerance), tolerance)
    for document in training:
        if isinstance(document, Pair):
            yield Document(document.name, document.prompt)
        elif isinstance(document, Conversation):
            yield document
        else:
            yield from _prompts_of(document.text, document.name)


def _prompts_of(text: str, name: str) -> list[Document]:
    return [Document(name, prompt) for prompt, _ in tile(text, PIECE_BYTES, PROMPT_BYTES)]


def _form(row: dict[str, Any], where: str) -> str:
    found = next((key for key in FORMS if key in row), None)
    if found is None:
        raise UserError(f"{where}: keys {sorted(row)}; a row needs one of {', '.join(FORMS)}")
    return found


def _of_row(row: dict[str, Any], form: str, name: str) -> list[Document]:
    """Raises UserError, FILE:LINE first."""
    if form in ("prompt", "text"):
        text = text_of(row, form, name, form)
        if row.get("special_tokens") is False:
            raise UserError(f"{name}: a prompt that a chat template wrote; give the conversation itself")
        return [Document(name, text)] if form == "prompt" else _prompts_of(text, name)
    if form == "turns":
        turns = row.get("turns")
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise UserError(f"{name}: 'turns' is {turns!r:.40}; it must be a list of strings")
        roles = ("user", "assistant")
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(roles, (turn, ""), strict=True)
        ]
        return [Conversation(name, messages)]
    return [Conversation(name, messages_of(row, form, name))]
