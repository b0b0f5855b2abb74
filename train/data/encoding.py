"""What a document becomes: token ids, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from layerskip_model.chat import ChatTemplate, Rendered, UnusableConversation
from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import begin_of_text
from train.data.examples import Conversation, Document, MalformedRow, Pair, Tolerance
from train.data.row_forms import RowForm
from train.data.sources import DataConfig
from train.data.streams import SourceSection

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1000, 2_000_000  # of one call of the tokenizer


@dataclass(frozen=True)
class Encoded:
    """One document or example, its special tokens included.

    `counted[i]` says whether ids[i] is to be predicted, None that all are. The first id is never predicted
    where documents are kept apart: nothing stands before it. `bytes` are the UTF-8 bytes of the predicted text.
    """

    ids: list[int]
    counted: list[bool] | None
    bytes: int


class Encoder(Protocol):
    """Tokenises what a source yields, in order, many documents at a time."""

    @property
    def rules(self) -> str:
        """A text that changes, beside the tokenizer, when the same documents become other ids."""
        ...

    def __call__(self, documents: Iterable[Document]) -> Iterator[Encoded]: ...


def encoder_for(
    source: SourceSection,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    tolerance: Tolerance | None = None,
) -> Encoder:
    """What tokenises a source's documents; rows that turn out malformed go to `tolerance` (default: an error).

    Raises UserError where conversations have no template.
    """
    if template := template_for([source], tokenizer, config):
        return ConversationEncoder(template, tolerance or Tolerance())
    return PairEncoder(tokenizer) if source.whole else TextEncoder(tokenizer)


def template_for(
    sources: Iterable[SourceSection], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> ChatTemplate | None:
    """The template that writes the sources' conversations, None where they have none. Raises UserError."""
    if any(isinstance(source, RowForm) and source.conversation is not None for source in sources):
        return ChatTemplate.load(tokenizer, config.chat_template)
    return None


def check_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Read and encode the first document of every source, with `tokenizer` None where it has yet to be trained.

    Raises UserError for what is wrong with it, for sources that cannot be read and for a template that is missing.
    """
    for source in [*config.train, *config.heldout_sources]:
        tolerance = Tolerance(config.skip_malformed, quiet=True)
        first = list(islice(source.documents(tolerance), 1))
        if tokenizer is not None:
            list(encoder_for(source, tokenizer, config, tolerance)(first))
        elif isinstance(first[0], Conversation) and config.chat_template is None:
            raise UserError(
                "model.tokenizer.train: a new tokenizer has no chat template, which conversations need; name a Jinja "
                "file in data.chat_template"
            )


@dataclass(frozen=True)
class TextEncoder:
    """`[begin] text`, and `[end]` after it where the tokenizer's begin is another token than its end.

    With one token for both, the begin of the next document is the end of this one.
    """

    tokenizer: PreTrainedTokenizerBase
    rules: str = "text"

    def __call__(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """Texts in batches; every token is predicted."""
        begin, end = begin_of_text(self.tokenizer), self.tokenizer.eos_token_id
        assert end is not None, "load_tokenizer refuses such a tokenizer"
        last = [] if begin == end else [end]
        for batch in _batches(documents):
            texts = [document.text for document in batch]
            for text, ids in zip(texts, _tokenize(self.tokenizer, texts), strict=True):
                yield Encoded([begin, *ids, *last], None, len(text.encode()))


@dataclass(frozen=True)
class PairEncoder:
    """`prompt response [end]`, the prompt as for generation: tokenised alone, with the tokenizer's special tokens.

    A response that was cut has no end.
    """

    tokenizer: PreTrainedTokenizerBase
    rules: str = "pair, cut or ended"

    def __call__(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """Pairs in batches; the response and the end are predicted."""
        end = self.tokenizer.eos_token_id
        assert end is not None, "load_tokenizer refuses such a tokenizer"
        for batch in _batches(documents):
            pairs = [pair for pair in batch if isinstance(pair, Pair)]
            assert len(pairs) == len(batch), "a source of pairs yields pairs"
            prompts = _tokenize(self.tokenizer, [pair.prompt for pair in pairs], special_tokens=True)
            responses = _tokenize(self.tokenizer, [pair.response for pair in pairs])
            for pair, prompt, response in zip(pairs, prompts, responses, strict=True):
                answer = [*response, end] if pair.ended else response
                counted = [False] * len(prompt) + [True] * len(answer)
                yield Encoded([*prompt, *answer], counted, len(pair.response.encode()))


@dataclass(frozen=True)
class ConversationEncoder:
    """Conversations as the chat template writes them, one or more examples each; see `ChatTemplate.render`."""

    template: ChatTemplate
    tolerance: Tolerance

    @property
    def rules(self) -> str:
        """The template."""
        return self.template.source

    def __call__(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """Conversations in batches; the assistant's tokens are predicted."""
        for batch in _batches(documents):
            talks = [document for document in batch if isinstance(document, Conversation)]
            assert len(talks) == len(batch), "a source of conversations yields conversations"
            found = self.template.render_all([talk.messages for talk in talks])
            for talk, examples in zip(talks, found, strict=True):
                if isinstance(examples, UnusableConversation):
                    self.tolerance(MalformedRow(f"{talk.name}: {examples}"))
                    continue
                for example in examples:
                    yield Encoded(example.ids, example.answers, self._bytes(example))

    def _bytes(self, example: Rendered) -> int:
        """UTF-8 bytes of the answers without special tokens."""
        answers = [token for token, answer in zip(example.ids, example.answers, strict=True) if answer]
        return len(str(self.template.tokenizer.decode(answers, skip_special_tokens=True)).encode())


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special_tokens: bool = False
) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special_tokens, verbose=False)["input_ids"]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
