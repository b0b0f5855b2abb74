"""python -m tests.train.several_runs RECIPE...: train them one after the other, in one launch of processes.

What the processes were like, and what each is told of a run that is refused, lies beside the first recipe.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from layerskip_model.processes import leave
from tests.train.toy_heads import ToyHeads
from train import UserError, load_recipe, train
from train.objectives import OBJECTIVES

if __name__ == "__main__":
    OBJECTIVES["toy_heads"] = ToyHeads
    for path in sys.argv[1:]:
        train(load_recipe(path))
    group = torch.distributed.distributed_c10d._get_default_group()
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    told: dict[str, float | str] = {"timeout": timeout.total_seconds()}
    try:
        train(load_recipe(sys.argv[1], ["seed=1"]))
    except UserError as error:
        told["refused"] = str(error)
    Path(sys.argv[1]).with_name(f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(told))
    leave(0)
