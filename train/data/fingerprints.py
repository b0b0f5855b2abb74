"""The content of files as hashes, remembered so that a large file is read once and not at every start."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from layerskip_model.errors import UserError


class FileHashes:
    """SHA-256 of files' bytes, remembered by path, size and time of change in the JSON file `memory` (if given)."""

    def __init__(self, memory: Path | None = None) -> None:
        self.memory = memory
        self._known: dict[str, list[object]] = {}
        if memory is not None:
            try:
                self._known = dict(json.loads(memory.read_text()))
            except (OSError, ValueError, TypeError):
                self._known = {}  # it is only a memory

    def of(self, path: str) -> str:
        """A file's hash, in hexadecimal. Raises UserError if it cannot be read."""
        try:
            stat = os.stat(path)
            key, seen = os.path.abspath(path), [stat.st_size, stat.st_mtime_ns]
            known = self._known.get(key)
            if isinstance(known, list) and known[:2] == seen:
                return str(known[2])
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); correct 'files'") from error
        self._known[key] = [*seen, digest]
        return digest

    def save(self) -> None:
        """Write what is known to the memory, whole or not at all."""
        if self.memory is not None:
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.memory.with_name(f".{self.memory.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self._known))
            os.replace(temporary, self.memory)
