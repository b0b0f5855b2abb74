"""Folders of made files, kept under the name of what they were made from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerskip_model.errors import UserError

_MADE = "made.json"


@dataclass(frozen=True)
class Cache:
    """A directory of such folders, which several runs may share and fill at the same time."""

    root: Path
    used: set[Path] = field(default_factory=set, init=False)  # the folders that were asked for

    def create(self) -> None:
        """Make the directory, if it is not there. Raises UserError where it cannot be written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            reason = None if os.access(self.root, os.W_OK) else os.strerror(errno.EACCES)
        except OSError as error:
            reason = error.strerror
        if reason is not None:
            raise UserError(
                f"{self.root} cannot be written ({reason}); set data.cache_dir to a directory that can"
            )

    def folder(self, kind: str, made_from: Any, make: Callable[[Path], None]) -> Path:
        """The folder KIND-DIGEST with what `make` writes into a new folder; made once, whole or not at all.

        `made_from`, anything that JSON holds, decides its content and is kept beside it.
        """
        text = json.dumps(made_from, sort_keys=True)
        target = self.root / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.used.add(target)
        if is_whole(target):
            return target
        temporary = self.root / f".{kind}-{uuid.uuid4().hex}"
        temporary.mkdir()
        try:
            make(temporary)
            files = [path for path in temporary.rglob("*") if path.is_file()]
            sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in sorted(files)}
            (temporary / _MADE).write_text(json.dumps({"files": sizes, "made_from": made_from}, indent=1))
            _put(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def delete_unused(self) -> None:
        """Delete the folders that were not asked for, where the directory belongs to one run."""
        for path in self.root.iterdir():
            if path.is_dir() and path not in self.used:
                shutil.rmtree(path)


def is_whole(folder: Path) -> bool:
    """Whether all files that were made are there, as long as they were."""
    try:
        sizes = json.loads((folder / _MADE).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _put(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError:
        if is_whole(target):  # another run made the same meanwhile
            return
        if not target.exists():
            raise
        shutil.rmtree(target)
        temporary.rename(target)
