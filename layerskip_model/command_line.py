"""What every command shares: both spellings of a flag, errors as one line with exit status 2, a new directory."""

from __future__ import annotations

import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import typer

from layerskip_model.errors import UserError

# What typer raises for a wrong flag: click's ClickException, of whichever click this typer uses.
FLAG_ERROR: Any = typer.BadParameter.__mro__[2]
GRACE = 2.0  # seconds


def flag(name: str, text: str, **how: Any) -> Any:
    """An option in both spellings, --under_score and --dash-ed."""
    spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
    return typer.Option(*spellings, help=text, **how)


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


@contextmanager
def new_directory(path: str) -> Iterator[Path]:
    """A directory to fill, which takes the name `path` when all is done: it is there whole or not at all.

    If the work fails, the directories that were made for it go again. Raises UserError where something else than an
    empty directory lies there, and where nothing can be written.
    """
    place = Path(path).resolve()
    partial = place.with_name(f".{place.name}.partial")
    made = [directory for directory in place.parents if not directory.exists()]
    try:
        try:
            if place.exists() and any(place.iterdir()):
                raise UserError(f"'{path}' is not empty; name a new directory, or an empty one")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"'{path}' cannot be written to ({error.strerror}); name another") from None
        yield partial
        partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for directory in made:
            with suppress(OSError):  # not there, or not empty
                directory.rmdir()
        raise
