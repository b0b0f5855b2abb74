"""What is evaluated: a checkpoint with its tokenizer, and what the run that made it left beside it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.decoding.capture import captured
from eval.results import TrainingPoint
from layerskip_model.context import MASKED
from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import (
    DEVICE_MAPS,
    DTYPES,
    FLASH_ATTENTION,
    QUANTIZATIONS,
    load_model,
    load_tokenizer,
    no_progress_bar,
    one_line,
)
from layerskip_model.formats.run import RUN_FILE, heads_of, model_of, read_run
from layerskip_model.jsonl import PromptRow, read_rows
from layerskip_model.runner import Runner


@dataclass(frozen=True)
class RunFiles:
    """A finished training run: `run.json` and the files that it names."""

    directory: Path
    content: dict[str, Any]

    @property
    def model(self) -> Path:
        """The checkpoint to decode with: what the run exported, or the model that it trained heads for."""
        return model_of(self.directory, self.content)

    @property
    def heads(self) -> Path | None:
        """The heads that it exported, if it trained some."""
        return heads_of(self.directory, self.content)

    @property
    def heldout(self) -> Path:
        """The held-out rows."""
        return self.directory / self.content["heldout"]

    @property
    def strategy(self) -> str:
        """The suggested strategy."""
        return self.content["suggested"]["strategy"]

    @property
    def suggested(self) -> dict[str, Any]:
        """Settings of the suggested strategy: exit_layer and num_speculations, or draft, the heads."""
        heads = {} if self.heads is None else {"draft": str(self.heads)}
        return heads | self.content["suggested"]["settings"]

    @property
    def length(self) -> int:
        """Tokens of a training sequence."""
        return self._batch()[1]

    def training_points(self) -> list[TrainingPoint]:
        """The logged losses, and the held-out loss of each exit where it was measured. Raises UserError."""
        points: dict[int, dict[str, Any]] = {}
        sequences, length = self._batch()
        for _, row in read_rows(self.directory / "log.jsonl"):
            step = int(row["step"])
            point = points.setdefault(step, {"step": step, "tokens": step * sequences * length})
            if "loss" in row:
                point["loss"] = row["loss"]
            names = [name for name in row if name.startswith("heldout/exit_") and name.endswith("/loss")]
            if names:
                point["heldout"] = {int(name.split("_")[1].split("/")[0]): row[name] for name in names}
        return [TrainingPoint(**point) for point in points.values() if "loss" in point]

    def _batch(self) -> tuple[int, int]:
        """Sequences of an optimizer step, tokens of a sequence."""
        path = self.directory / self.content["recipe"]
        try:
            batch = yaml.safe_load(path.read_text(encoding="utf-8"))["batch"]
            return int(batch["sequences"]), int(batch["length"])
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"run '{self.directory}': {path.name} is damaged ({reason}); train again"
            ) from None


@dataclass(frozen=True)
class Target:
    """A loaded model ready to decode. `name` is how the user called it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    runner: Runner
    run: RunFiles | None = field(default=None)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a generation: the generation config's, else the tokenizer's."""
        ids = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    def encode(self, prompt: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids, special tokens as the tokenizer adds them, or none but those that the text holds.

        Raises UserError for a prompt that is no text.
        """
        if not prompt:
            raise UserError("prompt '': is empty; give some text to continue")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt {prompt!a:.60}: is not valid UTF-8; mend its encoding") from None
        return self.tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"]

    def encode_row(self, row: PromptRow) -> list[int]:
        """Token ids of a prompts file's row. Raises UserError as `encode`."""
        return self.encode(row.prompt, special_tokens=row.special_tokens)


def open_run(directory: str | Path) -> RunFiles:
    """Read a run's run.json. Raises UserError where there is no finished run."""
    return RunFiles(Path(directory), read_run(directory))


def load_target(
    model: str | None = None,
    run: str | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    quantization: str | None = None,
    attn_implementation: str | None = None,
) -> Target:
    """Load a checkpoint (`model`: directory or hub name) or a finished run (`run`: its output directory).

    The whole model is put on `device`, by default the first GPU, else the CPU; a `device_map` spreads it over all
    GPUs, then the CPU, then the disk. The default dtype is float32 on a CPU, bfloat16 on a GPU.
    Raises UserError for anything that cannot be loaded or decoded.
    """
    if (model is None) == (run is None):
        raise UserError("give exactly one of --model (a checkpoint) and --run (a training run's output_dir)")
    files = open_run(run) if run is not None else _run_beside(Path(str(model)))
    name = str(files.model) if run is not None and files is not None else str(model)
    place = _place(device, device_map)
    on_gpu = torch.cuda.is_available() if isinstance(place, str) else place.type == "cuda"
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    if dtype not in DTYPES:
        raise UserError(f"--dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    _check_attention(attn_implementation, dtype, on_gpu)
    _check_quantization(quantization, dtype, on_gpu)
    tokenizer = load_tokenizer(name)
    with no_progress_bar() if Path(name).is_dir() else nullcontext():  # downloads show theirs
        loaded = load_model(
            name,
            dtype=dtype,
            device_map=place,
            quantization=quantization,
            attn_implementation=attn_implementation,
        )
    return Target(name, loaded, tokenizer, Runner(loaded), files)


def with_captured_passes(target: Target) -> Target:
    """The same target, its passes captured (`eval.decoding.capture`). Raises UserError where they cannot be."""
    return replace(target, runner=captured(target.runner))


def _run_beside(model: Path) -> RunFiles | None:
    """The run that exported this checkpoint, if it lies beside it."""
    if not (model.parent / RUN_FILE).is_file():
        return None
    files = open_run(model.parent)
    return files if model.is_dir() and files.model.resolve() == model.resolve() else None


def _place(device: str | None, device_map: str | None) -> torch.device | str:
    """Where the weights go: one device, or the name of a way to spread them."""
    if device_map is not None:
        if device is not None:
            raise UserError(f"--device '{device}' and --device_map '{device_map}': give one of the two")
        if device_map not in DEVICE_MAPS:
            raise UserError(
                f"--device_map '{device_map}' is not one of {', '.join(DEVICE_MAPS)}; one device is a --device"
            )
        return device_map
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device '{device}' cannot be used here: {str(error).splitlines()[0]}") from None
    return place


def _check_attention(name: str | None, dtype: str, on_gpu: bool) -> None:
    if name not in (None, *MASKED, *FLASH_ATTENTION):
        known = ", ".join((*MASKED, *FLASH_ATTENTION))
        raise UserError(f"--attn_implementation '{name}' is not one of {known}")
    if name in FLASH_ATTENTION and not (on_gpu and dtype in ("bfloat16", "float16")):
        raise UserError(
            f"--attn_implementation {name} needs a GPU and --dtype bfloat16 or float16, not {dtype} "
            f"on {'a GPU' if on_gpu else 'a CPU'}; give sdpa"
        )


def _check_quantization(name: str | None, dtype: str, on_gpu: bool) -> None:
    if name is None:
        return
    if name not in QUANTIZATIONS:
        raise UserError(f"--quantization '{name}' is not one of {', '.join(QUANTIZATIONS)}")
    if dtype == "float64":
        raise UserError(
            f"--quantization {name} cannot compute in float64; leave --dtype out or give bfloat16"
        )
    if not on_gpu:
        raise UserError(f"--quantization {name} needs a CUDA GPU; leave it out on a CPU")
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # it looks for its CUDA libraries when it is imported
        raise UserError(
            f"--quantization {name} needs bitsandbytes (pip install -e .[bitsandbytes]): {one_line(error)}"
        ) from None
