"""Short real decodes with the model in training: what LayerSkip and drafting heads are trained for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from eval.decoding.speculate import Generation
from eval.decoding.strategies import make_drafter
from eval.prompts import evenly_spaced
from eval.replay import OwnText, continued
from eval.target import Target
from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import FLASH_ATTENTION, load_model, no_progress_bar
from layerskip_model.jsonl import read_prompts
from layerskip_model.runner import Runner
from train.config import DecodeConfig
from train.run import Run
from train.run_directory import EXPORT_NAME

ROOM = 0.8  # of the free memory, for a copy of a sharded model
# No reason to lose a training: what the decoder refuses, a kernel does not do, memory or disk have no room for.
CANNOT = (UserError, RuntimeError, OSError)


def decode(run: Run, done: int) -> dict[str, float]:
    """Numbers of a short decode after `done` steps, named decode/..., where the recipe asks for it; else none.

    acceptance_length: tokens a forward of the target; acceptance_rate: accepted drafts over drafts;
    equal_tokens: the share that autoregressive decoding gives too, 1 but for ties that rounding decides;
    predicted_speedup: by the acceptance, without any timing; the settings that were used. Every rank calls it;
    the numbers are the main process's, and empty elsewhere. The model comes back as it was.
    """
    config = run.recipe.evaluate.decode
    if config is None:
        return {}
    with target_in_training(run) as target:
        if target is None:
            return {}
        fixed = {"num_speculations": config.num_speculations, "exit_layer": config.exit_layer}
        given = {name: value for name, value in fixed.items() if value is not None}
        try:
            written = write(run, target, config)
            best = run.objective.suggestion({}, written, given)
            drafted = written.decoded(run.objective.drafter(best, target.runner))
        except CANNOT as error:
            run.log.say(f"not decoded after step {done}: {error}")
            return {}
    if not any(generation.accepted_lengths for generation in drafted):
        run.log.say(f"nothing drafted after step {done}: every answer ended with its first token")
        return {}
    numbers = summarize(written.texts, drafted) | {"predicted_speedup": best["predicted_speedup"]}
    values = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in numbers.items())
    run.log.say(f"decoded after step {done}: {in_words(best)}: {values}")
    if numbers["equal_tokens"] < 1.0:
        run.log.say("drafting changed what is written, which only ties that rounding decides may explain")
    return {f"decode/{name}": float(value) for name, value in (numbers | best["settings"]).items()}


def suggest(run: Run, heldout: dict[str, float]) -> dict[str, Any]:
    """The objective's suggestion for run.json, by text that the model wrote where it can be decoded.

    Every rank calls it; only the main process's is meant to be kept.
    """
    with target_in_training(run) as target:
        if target is not None:
            try:
                written = write(run, target, run.recipe.evaluate.decode or DecodeConfig())
                return run.objective.suggestion(heldout, written, {})
            except CANNOT as error:
                run.log.say(f"the suggestion is by held-out text, as nothing was decoded: {error}")
        return run.objective.suggestion(heldout, None, {})


def write(run: Run, target: Target, config: DecodeConfig) -> OwnText:
    """What the model alone writes after held-out prompts. Raises UserError where there are none."""
    rows = read_prompts(run.data.heldout_prompts)
    context = min(target.runner.context_length, run.recipe.batch.length)
    longest = max(1, context - config.new_tokens)
    chosen = evenly_spaced(rows, min(config.prompts, len(rows)))
    prompts = [target.encode_row(row)[-longest:] for row in chosen]
    plain = make_drafter("autoregressive", target.runner)
    generations = continued(target.runner, plain, prompts, config.new_tokens, target.eos_token_ids)
    return OwnText(
        target.runner,
        prompts,
        texts=[generation.tokens for generation in generations],
        ended=[generation.finish_reason == "eos" for generation in generations],
        eos_token_ids=target.eos_token_ids,
    )


def in_words(suggestion: dict[str, Any]) -> str:
    """A suggested strategy and its settings."""
    return " ".join(
        [suggestion["strategy"], *(f"{name} {value}" for name, value in suggestion["settings"].items())]
    )


def summarize(texts: list[list[int]], drafted: list[Generation]) -> dict[str, float]:
    """Acceptance over all prompts, and how much of `texts` the same prompts got again."""
    lengths = [length for generation in drafted for length in generation.accepted_lengths]
    proposed = sum(generation.drafted for generation in drafted)
    equal = [
        ours == theirs
        for text, generation in zip(texts, drafted, strict=True)
        for ours, theirs in zip(text, generation.tokens, strict=False)
    ]
    total = sum(
        max(len(text), len(generation.tokens)) for text, generation in zip(texts, drafted, strict=True)
    )
    return {
        "acceptance_length": sum(lengths) / max(len(lengths), 1),
        "acceptance_rate": sum(generation.accepted for generation in drafted) / max(proposed, 1),
        "equal_tokens": sum(equal) / total,
    }


def gain_in_words(suggestion: dict[str, Any]) -> str:
    """What a suggested strategy gained where it was decoded with, to follow in a sentence; else nothing."""
    if "acceptance_length" not in suggestion:
        return ""
    return f"; {in_words(suggestion)}: {suggestion['acceptance_length']:.2f} tokens a forward on held-out prompts"


@contextmanager
def target_in_training(run: Run) -> Iterator[Target | None]:
    """The model to decode with, on the main process; None elsewhere, and where there is none. All ranks enter.

    Where every rank holds the whole model it is the one that trains, in evaluation mode meanwhile; where it is
    sharded, a copy in bfloat16 as it would be exported now, if there is room for it.
    """
    was_training = run.module.training
    run.module.eval()
    try:
        yield _target(run)
    finally:
        run.module.train(was_training)
        run.accelerator.wait_for_everyone()


def _target(run: Run) -> Target | None:
    model = run.objective.decodable()
    try:
        if model is not None and not run.engine.is_whole and run.objective.exported_heads() is not None:
            raise UserError(f"its heads are sharded ({run.engine.name}); benchmark the run when it is done")
        if model is not None and not run.engine.is_whole:
            state = _whole_state(run)
            model = None if state is None else _copy(run, state)
        if model is None or not run.accelerator.is_main_process:
            return None
        _refuse_wide_flash(model)
        return Target("the model in training", model, run.data.tokenizer, Runner(model, fuse=False))
    except CANNOT as error:
        run.log.say_once(f"the model is not decoded while it trains: {error}")
        return None


def _refuse_wide_flash(model: PreTrainedModel) -> None:
    """Raise UserError where attention would refuse the float32 masters: training has autocast, a decode has not."""
    attention = model.config.get_text_config()._attn_implementation
    if attention in FLASH_ATTENTION and model.get_input_embeddings().weight.dtype == torch.float32:
        raise UserError(f"{attention} has no float32; use attn_implementation: sdpa to decode while training")


def _whole_state(run: Run) -> dict[str, Tensor] | None:
    """The gathered weights, on the main process and if there is room for them and a copy. All ranks call it."""
    room = [run.accelerator.is_main_process and _has_room(run)]
    broadcast_object_list(room)
    if not room[0]:
        run.log.say_once(
            "the model is not decoded while it trains: it is sharded, and there is no room for a copy"
        )
        return None
    return run.engine.whole_state()


def _has_room(run: Run) -> bool:
    """For a bfloat16 copy on the device, made from a float32 and a bfloat16 one on the host."""
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.objective.parameters())
    host, device = 6 * parameters, 2 * parameters
    if run.accelerator.device.type == "cuda":
        if device > ROOM * torch.cuda.mem_get_info(run.accelerator.device)[0]:
            return False
    else:
        host += device
    return host <= ROOM * psutil.virtual_memory().available


def _copy(run: Run, state: dict[str, Tensor]) -> PreTrainedModel:
    """The model as it would be exported now, by way of the disk, as that is what merges and renames weights."""
    scratch = run.directory / f".{EXPORT_NAME}.partial"  # which --fresh and the export itself clear away
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        run.objective.export(scratch, state, torch.bfloat16, {})
        attention = run.recipe.model.attn_implementation
        place = run.accelerator.device
        with no_progress_bar():
            return load_model(str(scratch), dtype="bfloat16", device_map=place, attn_implementation=attention)
    finally:
        shutil.rmtree(scratch)
