"""python -m tests.eval.ranks_worker HOW: one process of a launch, whose number 1 does not do what it should."""

from __future__ import annotations

import os
import signal
import sys

import typer

from eval.ranks import join_ranks
from layerskip_model.command_line import run_app
from layerskip_model.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def work(how: str) -> None:
    """Exchange twice; number 1 refuses, fails or is killed in between."""
    ranks = join_ranks()
    with ranks.together():
        assert ranks.exchange(f"item {ranks.index}") == ["item 0", "item 1"]
        if ranks.index == 1:
            if how == "refuses":
                raise UserError("--this 'one': is wrong")
            if how == "fails":
                raise ZeroDivisionError
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.exchange(None)
        print("not reached")


if __name__ == "__main__":
    run_app(app, "worker", speaks=os.environ["RANK"] == "0")
    sys.exit("not reached")
