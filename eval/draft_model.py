"""Load a separate draft model for a target: in its dtype, on its device, of the same vocabulary."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from eval.decoding.capture import captured
from eval.decoding.drafters.speculative_sampling import DraftModel
from eval.target import Target
from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import load_model, load_tokenizer, no_progress_bar
from layerskip_model.runner import Runner

__all__ = ["DraftModel", "captured_like", "load_draft"]


def load_draft(target: Target, name: str) -> DraftModel:
    """The draft model `name` (a directory or a hub name), loaded to draft for `target`.

    Its passes are captured where the target's are. The tokens must have the same numbers in both; the logits may
    have other widths, as the padding after the last token differs. Raises UserError for a model that cannot be
    loaded or decoded, and for another vocabulary.
    """
    runner = target.runner
    try:
        check_vocabulary(name, load_tokenizer(name), target.tokenizer)
        with no_progress_bar() if Path(name).is_dir() else nullcontext():  # downloads show theirs
            model = load_model(
                name,
                dtype=str(runner.dtype).removeprefix("torch."),
                device_map=runner.device,
                attn_implementation=runner.backbone.config._attn_implementation,
            )
        return captured_like(runner, DraftModel(name, Runner(model)))
    except UserError as error:
        raise UserError(f"--draft: {error}") from None


def captured_like(runner: Runner, draft: DraftModel) -> DraftModel:
    """The draft model with captured passes if `runner` has captured ones, weights shared."""
    return DraftModel(draft.name, captured(draft.runner)) if runner.fixed_shapes else draft


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> None:
    """Raises UserError where a number stands for different tokens in the two, the first such named.

    Only added tokens, such as one for padding, may be missing in one of them.
    """
    vocabularies = [
        {number: token for token, number in one.get_vocab().items()} for one in (tokenizer, target)
    ]
    added = tokenizer.added_tokens_decoder.keys() | target.added_tokens_decoder.keys()
    theirs, ours = vocabularies
    for number in sorted(theirs.keys() | ours.keys()):
        pair = theirs.get(number), ours.get(number)
        if pair[0] != pair[1] and not (None in pair and number in added):
            their_token, our_token = ("missing" if token is None else repr(token) for token in pair)
            raise UserError(
                f"model '{name}' has another vocabulary: token {number} is {their_token} there and {our_token} in "
                f"the target ({len(theirs)} and {len(ours)} tokens); a draft model needs the target's tokenizer"
            )
