"""Flags' values, and the directory that commands write to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from layerskip_model.errors import UserError


def truth(text: str) -> bool:
    """True or False as a flag's value, in any case. Raises UserError."""
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise UserError(f"'{text}' is neither True nor False; --sample takes one of the two")
    return values[text.lower()]


def whole_numbers(flag: str, text: str) -> list[int]:
    """`4,8` as a flag's value. Raises UserError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} '{text}': give whole numbers with commas between them, {flag} 4,8") from None


@contextmanager
def output_directory(path: str | None) -> Iterator[Path | None]:
    """The directory, made and tried before the work begins, so that hours cannot be lost to a typing error.

    If the work fails, the directories that were made for it go again. Raises UserError.
    """
    if path is None:
        yield None
        return
    place = Path(path)
    made = [directory for directory in (place, *place.parents) if not directory.exists()]
    try:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise UserError(
                f"--output_dir '{path}' cannot be written to ({error.strerror}); name another"
            ) from None
        yield place
    except BaseException:
        for directory in made:
            with suppress(OSError):  # not there, or not empty
                directory.rmdir()
        raise
