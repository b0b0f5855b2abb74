"""A target that nobody trained: a tiny model, with a tokenizer whose tokens are characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eval.target import Target
from layerskip_model.runner import Runner


class Characters:
    """Token n is the n-th character from "a" on."""

    eos_token_id = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """As a tokenizer is called."""
        return {"input_ids": [ord(character) - ord("a") for character in text]}

    def decode(self, tokens: list[int], **options: Any) -> str:
        """As a tokenizer does."""
        return "".join(chr(ord("a") + token) for token in tokens)


def untrained(model: PreTrainedModel) -> Target:
    """The target of a model that lies in no run."""
    tokenizer: Any = Characters()
    return Target("untrained", model, tokenizer, Runner(model))


def prompts_file(directory: Path, *prompts: str) -> Path:
    """A dataset of these prompts."""
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path
