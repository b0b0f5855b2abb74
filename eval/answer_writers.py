"""Who answers requests: a model that is decoded here, or a command of the user's choice."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from transformers import GenerationConfig

from eval.choosing import Choosing, peer_config
from eval.decoding.speculate import Generation
from eval.generate import Generator
from eval.questions import Answer, Request, Unanswerable
from eval.streaming import TextStream
from eval.target import Target
from layerskip_model.chat import ChatTemplate, Messages, UnusableConversation
from layerskip_model.errors import UserError
from layerskip_model.formats.fingerprint import checkpoint_directory, fingerprint
from layerskip_model.jsonl import parse_row

EXAMPLE: Messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]


class AnswerWriter(Protocol):
    """Writes answers."""

    @property
    def job(self) -> dict[str, Any]:
        """All that decides its answers, for JSON."""
        ...

    def write(self, requests: Sequence[Request], streams: Sequence[int]) -> list[Answer | Unanswerable]:
        """One for each request, or why there is none. `streams`: the number of its own random numbers."""
        ...


@dataclass(frozen=True)
class ModelWriter:
    """Requests are decoded in one batch. `template` writes conversations; only they need one."""

    generator: Generator
    template: ChatTemplate | None
    settings: dict[str, Any]

    @classmethod
    def make(
        cls,
        target: Target,
        template: ChatTemplate | None,
        strategy: str,
        *,
        max_new_tokens: int,
        choosing: Choosing,
        **settings: Any,
    ) -> Self:
        """The arguments are those of `Generator.make`. Raises UserError as that does, and as `end_turns`."""
        if template is not None:
            end_turns(target, template)
        generator = Generator.make(
            target, strategy, max_new_tokens=max_new_tokens, choosing=choosing, **settings
        )
        return cls(generator, template, settings)

    @property
    def job(self) -> dict[str, Any]:
        """The weights, how they compute and how tokens are chosen. Reads all weights."""
        target, choosing = self.generator.target, self.generator.choosing
        return {
            "model": fingerprint(checkpoint_directory(target.name)),
            "dtype": str(target.runner.dtype).removeprefix("torch."),
            "quantization": str(getattr(target.model.config, "quantization_config", None)),
            "attn_implementation": target.model.config._attn_implementation,
            "tokenizer": sha256(str(sorted(target.tokenizer.get_vocab().items()))),
            "chat_template": None if self.template is None else sha256(self.template.source),
            "eos_token_ids": target.eos_token_ids,
            "strategy": self.generator.strategy,
            "settings": self.settings,
            "max_steps": self.generator.max_new_tokens,
            "choosing": {**peer_config(target, choosing), "acceptance": choosing.acceptance},
            "typical": None if choosing.lossless else choosing.typical,
            "seed": choosing.seed,
        }

    def write(self, requests: Sequence[Request], streams: Sequence[int]) -> list[Answer | Unanswerable]:
        """What the model answers. Raises UserError for a tokenizer that is not the model's."""
        found: list[Any] = [self._encode(request) for request in requests]
        fitting = [i for i, prompt in enumerate(found) if not isinstance(prompt, Unanswerable)]
        prompts = [found[i] for i in fitting]
        generations = self.generator.generate_tokens(prompts, streams=[streams[i] for i in fitting])
        for i, prompt, generation in zip(fitting, prompts, generations, strict=True):
            found[i] = self._answer(prompt, generation)
        return found

    def _encode(self, request: Request) -> list[int] | Unanswerable:
        target = self.generator.target
        if "prompt" in request:
            tokens = target.encode(request["prompt"])
        else:
            assert self.template is not None, "conversations need a template"
            try:
                text = checked_prompt(self.template, request["messages"])
            except UnusableConversation as error:
                return Unanswerable(str(error))
            tokens = target.encode(text, special_tokens=False)
        if len(tokens) >= target.runner.context_length:
            return Unanswerable("what is asked fills the model's context")
        return tokens

    def _answer(self, prompt: list[int], generation: Generation) -> Answer:
        """Its text; where it was cut, without what the next tokens might have changed, as half a character."""
        stream = TextStream(self.generator.target.tokenizer, prompt)
        answer = Answer(stream.push(generation.tokens), generation.finish_reason, len(generation.tokens))
        if not answer.is_whole:
            return answer
        return Answer(answer.text + stream.finish(), answer.finish_reason, answer.tokens)


def sha256(text: str) -> str:
    """A hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def checked_prompt(template: ChatTemplate, messages: Messages) -> str:
    """The text that the model is given before its answer.

    Raises UnusableConversation also where the template would write an answer otherwise than after this text, so that
    the answer could not be learnt as it was written.
    """
    if not template.has_marks:
        template.last_answer([*messages, EXAMPLE[-1]])
    return template.text(messages, prompt=True)


def end_turns(target: Target, template: ChatTemplate) -> None:
    """Let the token with which the template ends an answer end a generation.

    Some checkpoints' generation config knows the end of a text only; then the model would go on with a question
    of its own. Raises UserError for a template that cannot write a question and an answer.
    """
    try:
        (rendered, *_) = template.render(EXAMPLE)
    except UnusableConversation as error:
        raise UserError(f"chat template: {error}") from error
    last = max(i for i, is_answer in enumerate(rendered.answers) if is_answer)
    end, known = rendered.ids[last], target.eos_token_ids
    if end in target.tokenizer.all_special_ids and end not in known:
        config = target.model.generation_config or GenerationConfig()
        config.eos_token_id = [*known, end]
        target.model.generation_config = config


@dataclass(frozen=True)
class CommandWriter:
    """A command reads requests as JSON lines from its standard input and writes as many answers to its output.

    A request is {"prompt"} or {"messages"}, with "max_tokens" and a "seed" of its own; an answer is {"text",
    "finish_reason"}, in the same order, the reason "length" where it was cut.
    """

    command: str
    max_new_tokens: int

    @property
    def job(self) -> dict[str, Any]:
        """The command as it was given."""
        return {"command": self.command, "max_steps": self.max_new_tokens}

    def write(self, requests: Sequence[Request], streams: Sequence[int]) -> list[Answer | Unanswerable]:
        """What the command answers. Raises UserError where it fails or does not answer all."""
        if not requests:
            return []
        asked = [
            request | {"max_tokens": self.max_new_tokens, "seed": stream}
            for request, stream in zip(requests, streams, strict=True)
        ]
        given = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked)
        try:
            done = subprocess.run(
                shlex.split(self.command), input=given.encode(), stdout=subprocess.PIPE, check=True
            )
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise UserError(f"--command '{self.command}' failed: {error}; try it on one request") from None
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        if len(lines) != len(requests):
            raise UserError(
                f"--command '{self.command}' wrote {len(lines)} lines for {len(requests)} requests; "
                "it must answer each in one line"
            )
        where = f"--command '{self.command}', answer"
        return [_read_answer(line, f"{where} {number}") for number, line in enumerate(lines, start=1)]


def _read_answer(line: bytes, where: str) -> Answer:
    row = parse_row(line, where)
    text, reason = row.get("text"), row.get("finish_reason")
    if not isinstance(text, str) or not isinstance(reason, str):
        raise UserError(f"{where} has keys {sorted(row)}; it needs 'text' and 'finish_reason', both strings")
    tokens = row.get("tokens", 0)
    return Answer(text, reason, tokens if isinstance(tokens, int) else 0)
