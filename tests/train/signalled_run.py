"""python -m tests.train.signalled_run STEP SIGNAL RECIPE: `python -m train RECIPE`, struck by a signal in a step.

Under torchrun the launcher gets the signal, and every later step takes its time until it has passed it on.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from typing import Any

from train import loop


def main() -> None:
    """Patch the step, then run the real command."""
    at, number = int(sys.argv[1]), signal.Signals[sys.argv[2]]
    launched = "RANK" in os.environ
    original: Any = loop.train_step

    def struck(run: Any, step: int, *rest: Any) -> Any:
        if step == at and os.environ.get("RANK", "0") == "0":
            os.kill(os.getppid() if launched else os.getpid(), number)
        if step >= at and launched:
            time.sleep(0.1)
        return original(run, step, *rest)

    loop.__dict__["train_step"] = struck
    sys.argv = ["train", *sys.argv[3:]]
    runpy.run_module("train", run_name="__main__")


if __name__ == "__main__":
    main()
