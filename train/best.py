"""Which checkpoint of drafting heads is exported: the one that drafts best on held-out data, not the last.

Validation accuracy may rise while fewer drafts are accepted, so each checkpoint is judged by its acceptance length.
The numbers lie beside the checkpoint; there is no other state, so a resumed run chooses as one that never stopped.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from train.checkpoint import list_checkpoints, load_checkpoint, path_of
from train.run import Run
from train.run_directory import CHECKPOINTS_NAME

MEASURED_NAME = "drafting.json"
DECODE, TEACHER_FORCED = "decode", "teacher-forced"


@dataclass(frozen=True)
class Measured:
    """How a checkpoint drafts.

    Attributes:
        step: its finished optimizer steps.
        lengths: its acceptance length, tokens a forward of the target, as far as it is known: by a short "decode" of
            held-out prompts, and "teacher-forced" on held-out text.
        heldout: all metrics on held-out text.
        how: the recipe's `evaluate`, which all of these depend on.
    """

    step: int
    lengths: dict[str, float]
    heldout: dict[str, float]
    how: dict[str, Any]


@dataclass(frozen=True)
class Best:
    """The checkpoint that is exported, and the acceptance length that it was chosen by."""

    measured: Measured
    by: str  # DECODE or TEACHER_FORCED

    @property
    def step(self) -> int:
        """Its finished optimizer steps."""
        return self.measured.step

    @property
    def acceptance_length(self) -> float:
        """The largest one."""
        return self.measured.lengths[self.by]

    def told(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {"step": self.step, "acceptance_length": self.acceptance_length, "by": self.by}


def is_choosing(run: Run) -> bool:
    """Whether checkpoints are compared: those that are decoded with, of heads alone.

    A model that trains, too, has to be good at more than being drafted for.
    """
    return run.recipe.evaluate.decode is not None and run.objective.exported_heads() == "."


def remember(run: Run, done: int, decoded: dict[str, float], heldout: dict[str, float]) -> None:
    """Keep what was measured after `done` steps beside their checkpoint, which is there. Every rank calls it.

    `decoded` are the numbers of `decode`, empty where nothing was; `heldout` those of `evaluate`.
    """
    if run.accelerator.is_main_process:
        found = {
            DECODE: decoded.get("decode/acceptance_length"),
            TEACHER_FORCED: heldout.get("heldout/acceptance_length"),
        }
        lengths = {name: length for name, length in found.items() if length is not None}
        measured = Measured(done, lengths, heldout, run.recipe.evaluate.model_dump(mode="json"))
        path = path_of(run.directory / CHECKPOINTS_NAME, done) / MEASURED_NAME
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(measured)) + "\n")
        partial.replace(path)
    run.accelerator.wait_for_everyone()


def is_measured(run: Run, done: int) -> bool:
    """Whether the checkpoint of `done` steps has been measured in the way that the recipe now asks for."""
    return _read(run, path_of(run.directory / CHECKPOINTS_NAME, done)) is not None


def find_best(run: Run) -> Best | None:
    """The checkpoint with the longest acceptance, the later of equals; None where none is known.

    Like is compared with like: by decodes where all of them were decoded, else teacher-forced.
    """
    found = [_read(run, path) for path in list_checkpoints(run.directory / CHECKPOINTS_NAME)]
    measured = [one for one in found if one is not None]
    by = DECODE if all(DECODE in one.lengths for one in measured) else TEACHER_FORCED
    candidates = [Best(one, by) for one in measured if by in one.lengths]
    return max(candidates, key=lambda one: (one.acceptance_length, one.step), default=None)


def put_best_back(run: Run) -> Best | None:
    """Load the best checkpoint over the last step's; None where there was nothing to choose. Every rank calls it.

    Raises UserError for one that cannot be read.
    """
    if not is_choosing(run):
        return None
    chosen = [find_best(run) if run.accelerator.is_main_process else None]
    broadcast_object_list(chosen)
    best = chosen[0]
    if best is None:
        return None
    last = run.recipe.total_steps
    if best.step != last:
        load_checkpoint(path_of(run.directory / CHECKPOINTS_NAME, best.step), run.engine)
    run.log.say(
        f"step {best.step} of {last} is exported: of the checkpoints it drafts best, "
        f"{best.acceptance_length:.3f} tokens a forward ({best.by})"
    )
    return best


def _read(run: Run, checkpoint: Path) -> Measured | None:
    """What was measured of a checkpoint, unless it was in another way."""
    try:
        measured = Measured(**json.loads((checkpoint / MEASURED_NAME).read_text()))
    except (OSError, ValueError, TypeError):  # none yet, or damaged
        return None
    return measured if measured.how == run.recipe.evaluate.model_dump(mode="json") else None
