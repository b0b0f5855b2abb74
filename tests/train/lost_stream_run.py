"""python -m tests.train.lost_stream_run RECIPE ROWS [PAUSE]: train, with streams that cannot be read after ROWS rows.

PAUSE: seconds before each of two more attempts.
"""

from __future__ import annotations

import sys
from typing import Any

from layerskip_model.command_line import run_app
from train.__main__ import app
from train.data import stream_rows, streams

ROWS = int(sys.argv[2])


def read_row(self: Any, plain: Any = streams.DocumentStream._read_row) -> Any:
    if self._pauses and self._rows >= ROWS:
        raise ConnectionError("the line is down")
    return plain(self)


if __name__ == "__main__":
    stream_rows._CHUNK_DOCUMENTS = 4  # reads less ahead, so that some steps are done before the loss
    streams.RETRY_SECONDS = (float(sys.argv[3]) if len(sys.argv) > 3 else 0.01,) * 2
    streams.DocumentStream._read_row = read_row  # type: ignore[method-assign]
    sys.argv = ["train", sys.argv[1]]
    run_app(app, "python -m train")
