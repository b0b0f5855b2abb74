"""Work of many batches that survives being killed: what is done lies in lines that several processes append."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from layerskip_model.errors import UserError

Done = dict[int, Any]  # what came of each batch, by its number


class Journal:
    """A process's own file of batches that are done, among those of all processes in one directory."""

    def __init__(self, directory: Path, index: int) -> None:
        self.path = directory / f"part-{index}.jsonl"

    def add(self, batch: int, result: Any) -> None:
        """Keep what came of a batch: one line, on the disk when this returns."""
        line = json.dumps({"batch": batch, "result": result}, ensure_ascii=False) + "\n"
        with open(self.path, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def read_journals(directory: Path) -> Done:
    """All batches that are done. A last line that was cut short is removed: nobody may be writing.

    Raises UserError for a file that is damaged elsewhere.
    """
    done: Done = {}
    for path in sorted(directory.glob("part-*.jsonl")):
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            with open(path, "r+b") as file:
                file.truncate(len(whole[0]) + len(whole[1]))
        try:
            lines = [json.loads(line) for line in whole[0].splitlines()]
            done |= {int(line["batch"]): line["result"] for line in lines}
        except (ValueError, TypeError, KeyError):
            raise UserError(f"'{path}' is damaged; start anew with --fresh") from None
    return done
