"""recorded.json beside drafting heads: how good they were when they were exported, and what an EAGLE head said then."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import DTYPES
from layerskip_model.head_probe import STEPS, Probe

RECORD_FILE = "recorded.json"
AGREEMENT = re.compile(r"(?:head|step)_(\d+)/agreement")  # as training logs it


@dataclass(frozen=True)
class Record:
    """What was known of heads.

    Attributes:
        acceptance_length: tokens a forward of the target by the chain of first choices, on held-out text; None where
            it was not measured.
        agreement: of each head, or step of a head, with the target's own first choice there.
        probe: None for heads that have none, and where training could not run them alone.
    """

    acceptance_length: float | None = None
    agreement: tuple[float, ...] = ()
    probe: Probe | None = None

    @classmethod
    def of(cls, heldout: dict[str, float], probe: Probe | None) -> Record:
        """From the last metrics on held-out text, empty where there are none."""
        found = {int(match[1]): heldout[name] for name in heldout if (match := AGREEMENT.fullmatch(name))}
        agreement = tuple(found[number] for number in sorted(found))
        return cls(heldout.get("acceptance_length"), agreement, probe)


def write_record(directory: Path, record: Record) -> None:
    """Into a directory that is there."""
    content = asdict(record)
    (directory / RECORD_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_record(directory: str | Path) -> Record:
    """What lies beside heads; an empty one where nothing does. Raises UserError for a damaged file."""
    path = Path(directory) / RECORD_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _record(content)
    except (FileNotFoundError, NotADirectoryError):
        return Record()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"heads '{directory}': {RECORD_FILE} is damaged ({error}); export them again, or delete it to go without "
            "its checks"
        ) from None


def carry_record(source: str | Path, directory: Path, dtype: torch.dtype) -> None:
    """Write what lies beside heads beside a copy of them in `dtype` too; nothing where nothing does.

    A probe is compared as exactly as the coarser of its own dtype and the copy's allows. Raises UserError as
    `read_record`.
    """
    record = read_record(source)
    if record == Record():
        return
    if record.probe is not None:
        coarser = max(DTYPES[record.probe.dtype], dtype, key=lambda one: torch.finfo(one).eps)
        probe = replace(record.probe, dtype=str(coarser).removeprefix("torch."))
        record = replace(record, probe=probe)
    write_record(directory, record)


def _record(content: dict[str, Any]) -> Record:
    length, probe = content["acceptance_length"], content["probe"]
    if probe is not None:
        probe = Probe(list(map(int, probe["tokens"])), probe["log_probs"], str(probe["dtype"]))
        if probe.dtype not in DTYPES or len(probe.log_probs) != STEPS:
            raise ValueError("its probe has another dtype or other steps than probes have")
        for step, values in enumerate(probe.log_probs):
            if len(values) != len(probe.tokens) - 2 - step or not all(map(math.isfinite, values)):
                raise ValueError(f"step {step} of the probe is not whole")
    return Record(None if length is None else float(length), tuple(map(float, content["agreement"])), probe)
