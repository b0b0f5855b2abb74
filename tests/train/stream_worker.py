"""python -m tests.train.stream_worker FOLDER STATE: what each process gets of a stream of tiny documents.

Steps 0 to 5 in one go, and again in two halves, the second from the first one's state as a file keeps it. Each
process writes FOLDER/rankN.json. Then the source is lost for good after some steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from layerskip_model.processes import leave
from tests.train.tiny_streams import FlakySource, new_batches
from train.data import stream_rows
from train.data.streams import SourceLost
from train.processes import join

if __name__ == "__main__":
    stream_rows._CHUNK_DOCUMENTS = 4  # so that some steps are done before the loss
    folder = Path(sys.argv[1])
    state = join()
    ranks = {"rank": state.process_index, "world": state.num_processes}
    told: dict[str, Any] = {}

    def rows(batches: Any) -> list[Any]:
        return [
            [{key: values.tolist() for key, values in micro.items()} for micro in step] for step in batches
        ]

    told["whole"] = rows(new_batches(FlakySource(), start=0, stop=6, **ranks))
    first = new_batches(FlakySource(), start=0, stop=2, **ranks)
    told["halves"] = rows(first)
    saved = first.state()
    assert (saved is None) == (state.process_index > 0)
    if saved is not None:
        torch.save(saved, folder / "state.pt")
        saved = torch.load(folder / "state.pt", weights_only=True)
    told["halves"] += rows(new_batches(FlakySource(), start=2, stop=6, state=saved, **ranks))

    lost = new_batches(FlakySource(gone_after=30), start=0, stop=100, **ranks)
    told["before the loss"] = []
    try:
        for step in lost:
            told["before the loss"].append(rows([step])[0])
    except SourceLost as error:
        told["lost"] = str(error)
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(told))
    leave(0)
