"""Stop strings: text at which a generation ends."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from layerskip_model.errors import UserError

# A tokenizer may drop a space, or show half a character, at the start of what it decodes.
MARGIN = 4


class StopStrings:
    """Whether the newest token completed a stop string in the decoded new text, also one over several tokens.

    Special tokens take part in the text. Raises UserError for an empty stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        if "" in strings:
            raise UserError("stop string '' would end every generation at once; leave it out")
        self.tokenizer = tokenizer
        self.strings = tuple(strings)
        # A token carries at least one byte, so a string lies within as many last tokens as it has bytes.
        self.window = max((len(text.encode()) for text in self.strings), default=0) + MARGIN

    def __call__(self, tokens: list[int]) -> bool:
        """True if the text of the new tokens, all but the last seen before, contains a stop string."""
        text = self.tokenizer.decode(
            tokens[-self.window :], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return any(string in text for string in self.strings)
