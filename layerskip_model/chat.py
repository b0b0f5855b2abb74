"""Conversations as token ids, through a chat template, and which of the ids are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import one_line

Messages = list[dict[str, Any]]  # each with a role and, as a rule, a content
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class UnusableConversation(ValueError):
    """A conversation that the template cannot write, or not so that the answers can be told apart; a phrase."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation; `answers[i]` says whether ids[i] is to be learnt: the assistant wrote it."""

    ids: list[int]
    answers: list[bool]


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template that writes messages as the text that a model reads, and the tokenizer of that text.

    The template writes all special tokens itself: none are added to its text.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str

    @classmethod
    def load(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        path: str | Path | None = None,
        setting: str = "data.chat_template",
    ) -> ChatTemplate:
        """The template of a Jinja file, or else the tokenizer's own.

        Raises UserError, naming the `setting` that gives the file, where it cannot be read or is no template, and where
        the tokenizer has none.
        """
        if path is None:
            return cls(tokenizer, _own_template(tokenizer, setting))
        try:
            template = cls(tokenizer, Path(path).expanduser().read_text(encoding="utf-8"))
            template.text([{"role": "user", "content": ""}])
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{setting}='{path}' cannot be read: {one_line(error)}; name a Jinja file"
            ) from error
        except TemplateSyntaxError as error:
            raise UserError(
                f"{setting}='{path}', line {error.lineno}: {error.message}; correct the template"
            ) from error
        except UnusableConversation:
            pass  # it may want other messages than this one
        return template

    @property
    def has_marks(self) -> bool:
        """Whether it marks what the assistant writes with {% generation %}."""
        return _GENERATION_MARK.search(self.source) is not None

    def text(self, messages: Messages, *, prompt: bool = False) -> str:
        """The messages as text; as a `prompt`, up to where the assistant's next message begins.

        Raises UnusableConversation with the template's own reason.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, add_generation_prompt=prompt
            )
        except TemplateSyntaxError:
            raise
        except Exception as error:  # templates raise what they like, and fail as programs do
            raise UnusableConversation(f"the chat template refuses it: {one_line(error)}") from error
        return str(text)

    def render(self, messages: Messages) -> list[Rendered]:
        """Token ids with the answers found: by the template's marks, else by comparing it with its beginnings.

        One example, or one a turn where the template writes earlier turns differently later on (it may drop their
        thinking). The token that ends an answer belongs to it: the model must learn to stop. What follows the last
        answer is left out. Raises UnusableConversation where no answer can be told apart.
        """
        (found,) = self.render_all([messages])
        if isinstance(found, UnusableConversation):
            raise found
        return found

    def render_all(self, conversations: Sequence[Messages]) -> list[list[Rendered] | UnusableConversation]:
        """`render` of many, tokenised together; what it raises stands in the conversation's place."""
        if self.has_marks:
            return [_caught(self._by_marks, messages) for messages in conversations]
        found = [_caught(self._turns, messages) for messages in conversations]
        texts = [text for turns in found if isinstance(turns, list) for turn in turns for text in turn]
        ids = iter(self._tokenize(texts))
        return [_caught(self._joined, turns, ids) if isinstance(turns, list) else turns for turns in found]

    def last_answer(self, messages: Messages) -> tuple[str, str]:
        """The text that the model is given before the assistant's last message, and this message's text.

        Special tokens at the answer's end are left out. Raises UnusableConversation.
        """
        turn = _answers(messages)[-1]
        before, through = self.text(messages[:turn], prompt=True), self.text(messages[: turn + 1])
        _check_text(before, through)
        ids, start = _after(*self._tokenize([before, through]))
        stop = self._end_of_answer(ids, start, len(ids))
        return before, str(self.tokenizer.decode(ids[start:stop], skip_special_tokens=True)).strip()

    def _by_marks(self, messages: Messages) -> list[Rendered]:
        """The whole conversation, the mask from the template's {% generation %} blocks."""
        messages = messages[: _answers(messages)[-1] + 1]
        try:
            found: Any = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.source,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"return_offsets_mapping": True},
            )
        except Exception as error:  # as in `text`
            raise UnusableConversation(f"the chat template refuses it: {one_line(error)}") from error
        ids, mask, places = list(found["input_ids"]), found["assistant_masks"], found["offset_mapping"]
        answers = [False] * len(ids)
        edges = [i for i in range(len(ids)) if mask[i] and not (i and mask[i - 1])]
        for start in edges:
            stop = next((i for i in range(start, len(ids)) if not mask[i]), len(ids))
            while stop < len(ids) and places[stop][0] < places[stop - 1][1]:
                stop += 1  # the mask has only the first token of the answer's last character
            if stop < len(ids) and ids[stop] in self._ends and ids[stop - 1] not in self._ends:
                stop += 1  # the marks leave out the token that ends the turn
            stop = self._end_of_answer(ids, start, stop)
            answers[start:stop] = [True] * (stop - start)
        if not any(answers):
            raise UnusableConversation("the chat template's generation marks hold no answer")
        return [Rendered(ids, answers)]

    def _turns(self, messages: Messages) -> list[tuple[str, str]]:
        """The text before each answer and the text to its end. Raises UnusableConversation where none is good."""
        turns: list[tuple[str, str]] = []
        reasons: list[UnusableConversation] = []
        for place in _answers(messages):
            try:
                before, through = self.text(messages[:place], prompt=True), self.text(messages[: place + 1])
                _check_text(before, through)
                turns.append((before, through))
            except UnusableConversation as error:
                reasons.append(error)
        if not turns:
            raise reasons[0]
        return turns

    def _joined(self, turns: list[tuple[str, str]], ids: Iterator[list[int]]) -> list[Rendered]:
        """Examples of the turns, whose texts' ids come next: a turn joins the one before where it begins with it."""
        examples: list[Rendered] = []
        last = ""  # the text of the last example
        reasons: list[UnusableConversation] = []
        for (_, through), pair in [(turn, (next(ids), next(ids))) for turn in turns]:
            try:
                whole, start = _after(*pair)
            except UnusableConversation as error:
                reasons.append(error)
                continue
            stop = self._end_of_answer(whole, start, len(whole))
            answers = [start <= i < stop for i in range(len(whole))]
            previous = examples[-1] if examples else Rendered([], [])
            if through.startswith(last) and whole[: len(previous.ids)] == previous.ids:
                answers[: len(previous.ids)] = previous.answers
                examples = examples[:-1]
            examples.append(Rendered(whole, answers))
            last = through
        if not examples:
            raise reasons[0]
        return examples

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _end_of_answer(self, ids: list[int], start: int, stop: int) -> int:
        """The end of ids[start:stop] without the white space that a template writes after the turn's end."""
        ends = [i + 1 for i in range(start, stop) if ids[i] in self._ends]
        if ends and not str(self.tokenizer.decode(ids[ends[-1] : stop])).strip():
            return ends[-1]
        return stop

    @cached_property
    def _ends(self) -> frozenset[int]:
        """The tokens that can end a turn: special ones, less that which only begins texts."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return frozenset(self.tokenizer.all_special_ids) - ({bos} if bos != eos else set())


Found = TypeVar("Found")


def _caught(work: Callable[..., Found], *arguments: Any) -> Found | UnusableConversation:
    try:
        return work(*arguments)
    except UnusableConversation as error:
        return error


def _check_text(before: str, through: str) -> None:
    if not through.startswith(before) or through == before:
        raise UnusableConversation(
            "the chat template writes the prompt before an answer otherwise than the same messages with the "
            "answer, so the answer's tokens cannot be told; use a template with generation marks"
        )


def _after(before: list[int], through: list[int]) -> tuple[list[int], int]:
    """The ids to an answer's end, and where the answer begins. Raises UnusableConversation."""
    if through[: len(before)] != before:
        raise UnusableConversation(
            "the prompt before an answer has other tokens alone than with the answer after it; use a template "
            "whose prompt ends where a token ends (with no space), or one with generation marks"
        )
    return through, len(before)


def _answers(messages: Messages) -> list[int]:
    """The places of the assistant's messages. Raises UnusableConversation if there are none."""
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        raise UnusableConversation("a conversation without an answer; it needs a message of the assistant")
    return places


def _own_template(tokenizer: PreTrainedTokenizerBase, setting: str) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        name = tokenizer.name_or_path
        raise UserError(
            f"tokenizer '{name}' has no chat template, which conversations need; name a Jinja file in "
            f"{setting}"
        ) from None
