"""States of a frozen model on disk, so that what learns from them need not run the model again.

A directory is about one set of rows of tokens, numbered from 0, of which it holds some or all. `manifest.json` says
what the states were made from, and lists the shards with their rows and bytes. A shard `features-NNNNN.safetensors`
has the numbers of its rows, `rows` [n], and their states, `features` [n, seq, width]. Everything is written aside and
renamed, a shard before the manifest that lists it: what is listed is whole, unless it was damaged later.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerskip_model.errors import UserError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"

Place = tuple[str, int]
"""Where the states of a row are: the name of a shard, and the number within it."""


class FeatureFiles:
    """The shards of one directory. Any process may read them; one at a time adds some (see `alone`)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def claim(self, made_from: Mapping[str, Any], versions: Mapping[str, Any]) -> list[str]:
        """Make the directory one of states made from this; damaged shards in it are deleted: their names.

        `made_from` holds texts and numbers. Of two models only the "fingerprint" is compared, "model" is but its name.
        Raises UserError where the states there were made from something else, and where it cannot be written.
        """
        try:
            told = self._manifest()
            if told is None:
                self._write(
                    {"format": FORMAT, "made_from": dict(made_from), "versions": versions, "shards": {}}
                )
                return []
            self._refuse_others(told, made_from)
            damaged = [
                name for name, size in told["shards"].items() if not self._is_whole(name, size["bytes"])
            ]
            if damaged:
                kept = {name: size for name, size in told["shards"].items() if name not in damaged}
                self._write(told | {"shards": kept})
            for name in damaged:
                (self.directory / name).unlink(missing_ok=True)
            return damaged
        except OSError as error:
            raise self._cannot_write(error) from None

    def places(self) -> dict[int, Place]:
        """Each row that is there, and where. Raises UserError where a shard cannot be read."""
        found: dict[int, Place] = {}
        for name in self._listed():
            rows = self._read(name, lambda file: file.get_tensor("rows"))
            found |= {row: (name, number) for number, row in enumerate(rows.tolist())}
        return found

    def read(self, place: Place) -> Tensor:
        """The states of one row, [seq, width], mapped from the file. Raises UserError where it cannot be read."""
        name, number = place
        return self._read(name, lambda file: file.get_slice("features")[number])

    def next_names(self, number: int) -> list[str]:
        """Names for so many new shards."""
        used = [int(name.removesuffix(".safetensors").split("-")[1]) for name in self._listed()]
        first = max(used, default=-1) + 1
        return [f"features-{index:05d}.safetensors" for index in range(first, first + number)]

    def write(self, name: str, rows: Sequence[int], features: Tensor) -> None:
        """Write a shard, which no manifest lists yet: `features` [n, seq, width] of `rows` [n]. Raises UserError."""
        partial = self.directory / f".{name}.partial"
        try:
            save_file({"rows": torch.tensor(rows), "features": features}, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # the bytes are there before the name is
            partial.replace(self.directory / name)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise self._cannot_write(error) from None

    def enlist(self, names: Sequence[str]) -> None:
        """Add shards that were written to the manifest."""
        told = self._manifest()
        assert told is not None, "claim comes first"
        for name in names:
            size = (self.directory / name).stat().st_size
            rows = self._read(name, lambda file: file.get_slice("rows").get_shape()[0])
            told["shards"][name] = {"rows": rows, "bytes": size}
        self._write(told)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make the directory, and let no other process fill it meanwhile. Raises UserError where one does already."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = (self.directory / LOCK_FILE).open("w")
        except OSError as error:
            raise self._cannot_write(error) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"features.cache: another run fills {self.directory} now; wait for it, or name another directory"
                ) from None
            yield

    def _cannot_write(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or error
        return UserError(
            f"features.cache: {self.directory} cannot be written ({reason}); name another directory"
        )

    def _refuse_others(self, told: Mapping[str, Any], made_from: Mapping[str, Any]) -> None:
        theirs, way_out = told["made_from"], "name another directory, or delete that one"
        if theirs.get("fingerprint") != made_from["fingerprint"]:
            raise UserError(
                f"features.cache: {self.directory} was made by '{theirs.get('model')}' with other weights than "
                f"'{made_from['model']}' has now (the fingerprint differs); {way_out}"
            )
        for key, ours in made_from.items():
            if key != "model" and theirs.get(key) != ours:
                raise UserError(
                    f"features.cache: {self.directory} was made with other features ({key}: {theirs.get(key)} there, "
                    f"{ours} here); {way_out}"
                )

    def _is_whole(self, name: str, size: int) -> bool:
        path = self.directory / name
        try:
            with safe_open(path, "pt") as file:  # compares the file's length with what its header says
                return path.stat().st_size == size and set(file.keys()) == {"rows", "features"}
        except (OSError, SafetensorError):
            return False

    def _read(self, name: str, get: Any) -> Any:
        """From a shard, opened for this alone: no handle is kept that another process could not have."""
        path = self.directory / name
        try:
            with safe_open(path, "pt") as file:
                return get(file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"features.cache: {path} is gone or damaged ({error}); run again to have it made again"
            ) from None

    def _listed(self) -> list[str]:
        told = self._manifest()
        if told is None:
            raise UserError(
                f"features.cache: {self.directory} holds no features; use a folder that all processes see"
            )
        return sorted(told["shards"])

    def _manifest(self) -> dict[str, Any] | None:
        path = self.directory / MANIFEST_FILE
        try:
            told = json.loads(path.read_text())
            if told["format"] != FORMAT:
                raise ValueError(f"its format is {told['format']}, not {FORMAT}")
            if not isinstance(told["made_from"], dict) or not isinstance(told["shards"], dict):
                raise ValueError("it lists no shards")
            return told
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"features.cache: {path} cannot be used ({error}); delete {self.directory}"
            ) from None

    def _write(self, told: Mapping[str, Any]) -> None:
        partial = self.directory / f".{MANIFEST_FILE}.partial"
        partial.write_text(json.dumps(told, indent=1) + "\n")
        partial.replace(self.directory / MANIFEST_FILE)
