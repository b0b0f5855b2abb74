"""What is evaluated: a checkpoint with its tokenizer, and what the run that made it left beside it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.results import TrainingPoint
from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import DTYPES, load_model, load_tokenizer, no_progress_bar
from layerskip_model.jsonl import read_rows
from layerskip_model.runner import IMPLEMENTATIONS, Runner


@dataclass(frozen=True)
class RunFiles:
    """A finished training run: `run.json` and the files that it names."""

    directory: Path
    content: dict[str, Any]

    @property
    def model(self) -> Path:
        """The exported checkpoint."""
        return self.directory / self.content["base"]

    @property
    def heldout(self) -> Path:
        """The held-out rows."""
        return self.directory / self.content["heldout"]

    @property
    def suggested(self) -> dict[str, Any]:
        """Settings of the suggested strategy: exit_layer, num_speculations."""
        return self.content["suggested"]["settings"]

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

    def encode(self, prompt: str) -> list[int]:
        """Token ids, special tokens as the tokenizer adds them. Raises UserError for a prompt that is no text."""
        if not prompt:
            raise UserError("prompt '': is empty; give some text to continue")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt {prompt!a:.60}: is not valid UTF-8; mend its encoding") from None
        return self.tokenizer(prompt)["input_ids"]


def open_run(directory: str | Path) -> RunFiles:
    """Read a run's run.json. Raises UserError where there is no finished run."""
    path = Path(directory) / "run.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"run '{directory}' is no finished training run: it has no run.json; name a run's output_dir"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"run '{directory}': run.json is damaged ({error}); train again") from None
    if not _is_run(content):
        wanted = "base, heldout, recipe and suggested.settings"
        raise UserError(f"run '{directory}': run.json is damaged (it needs {wanted}); train again")
    return RunFiles(Path(directory), content)


def _is_run(content: Any) -> bool:
    """Whether run.json has what is read from it here."""
    if not isinstance(content, dict):
        return False
    suggested = content.get("suggested")
    names = all(isinstance(content.get(key), str) for key in ("base", "heldout", "recipe"))
    return names and isinstance(suggested, dict) and isinstance(suggested.get("settings"), dict)


def load_target(
    model: str | None = None,
    run: str | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    attn_implementation: str | None = None,
) -> Target:
    """Load a checkpoint (`model`: directory or hub name) or a finished run (`run`: its output directory).

    The default device is the first GPU, else the CPU; the default dtype float32 on a CPU, bfloat16 on a GPU.
    Raises UserError for anything that cannot be loaded or decoded.
    """
    if (model is None) == (run is None):
        raise UserError("give exactly one of --model (a checkpoint) and --run (a training run's output_dir)")
    files = open_run(run) if run is not None else _run_beside(Path(str(model)))
    name = str(files.model) if run is not None and files is not None else str(model)
    place = _device(device)
    dtype = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise UserError(f"--dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    if attn_implementation not in (None, *IMPLEMENTATIONS):
        raise UserError(f"--attn_implementation '{attn_implementation}': give {' or '.join(IMPLEMENTATIONS)}")
    tokenizer = load_tokenizer(name)
    with no_progress_bar() if Path(name).is_dir() else nullcontext():  # downloads show theirs
        loaded = load_model(name, dtype=dtype, device=place, attn_implementation=attn_implementation)
    return Target(name, loaded, tokenizer, Runner(loaded), files)


def _run_beside(model: Path) -> RunFiles | None:
    """The run that exported this checkpoint, if it lies beside it."""
    if not (model.parent / "run.json").is_file():
        return None
    files = open_run(model.parent)
    return files if model.is_dir() and files.model.resolve() == model.resolve() else None


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device '{name}' cannot be used here: {str(error).splitlines()[0]}") from None
    return device
