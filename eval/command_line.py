"""What the commands share: errors as one line and exit status 2, and the directory that they write to."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

import typer

from layerskip_model.errors import UserError

# What typer raises for a wrong flag: click's ClickException, of whichever click this typer uses.
FLAG_ERROR: Any = typer.BadParameter.__mro__[2]
GRACE = 2.0  # seconds


def run_app(app: typer.Typer, program: str, *, speaks: bool = True) -> NoReturn:
    """Run a command and exit: 0, 2 with one line for a mistake of the user's, 130 for an interruption.

    `speaks`: whether that line is printed; of processes that make the same mistake one is enough.
    """
    try:
        status = _run(app, program, speaks)
    except Exception:
        traceback.print_exc()
        status = 1
    processes = sys.modules.get("layerskip_model.processes")
    if processes is not None:  # else there are none to leave, and a typing error need not wait for torch
        processes.leave(status)
    if status == 2 and not speaks:
        time.sleep(GRACE)  # launchers stop all once one has failed, and another one says why
    sys.exit(status)


def _run(app: typer.Typer, program: str, speaks: bool) -> int:
    """The exit status."""
    try:
        status = app(prog_name=program, standalone_mode=False)
    except UserError as error:
        lines = [str(error)]
    except FLAG_ERROR as error:
        context = getattr(error, "ctx", None)
        lines = [error.format_message(), f"see: {context.command_path if context else program} --help"]
    except (KeyboardInterrupt, typer.Abort):
        return 130
    else:
        return status if isinstance(status, int) else 0
    if speaks:
        print(f"error: {lines[0]}", *lines[1:], sep="\n", file=sys.stderr)
    return 2


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
