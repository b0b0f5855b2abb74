"""python -m tests.train.engine_runs ENGINE... -- RECIPE...: train them under each engine, in one launch on CPUs.

A recipe's output directory gets the engine's name appended. One whose name ends in "stopped" is stopped after
half its steps and called again.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from layerskip_model.processes import leave
from train import Interrupted, features, load_recipe, loop, train

SMALL_SHARD = 10 * 16 * 32 * 4  # bytes, ten rows of the tiny runs that train heads

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    },
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "offload": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    },
    # Every parameter is split; by default the small ones, which are all of a tiny model's, stay whole.
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": json.dumps(
            {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
        ),
    },
}


def enter(engine: str) -> None:
    """Make this launch one of the engine, as `accelerate launch` does by the environment."""
    for settings in ENVIRONMENTS.values():
        for name in settings:
            os.environ.pop(name, None)
    os.environ.update(ENVIRONMENTS[engine])
    PartialState._reset_state()
    AcceleratorState._reset_state()


def join() -> PartialState:
    """As the loop's, but let accelerate take FSDP seriously on a CPU: it looks for it among GPUs only."""
    state = original_join()
    if os.environ.get("ACCELERATE_USE_FSDP"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return state


def run(path: str, engine: str) -> None:
    recipe = load_recipe(path)
    recipe = recipe.model_copy(update={"output_dir": f"{recipe.output_dir}_{engine}"})
    if recipe.features is not None:  # each engine computes its own
        kept = recipe.features.model_copy(update={"cache": f"{recipe.features.cache}_{engine}"})
        recipe = recipe.model_copy(update={"features": kept})
    if not recipe.output_dir.endswith(f"stopped_{engine}"):
        train(recipe)
        return
    half = recipe.total_steps // 2

    def stopping(run: Any, step: int, micro: Any, sums: Any, stop_requested: bool) -> Any:
        return original_step(run, step, micro, sums, stop_requested or step == half - 1)

    loop.__dict__["train_step"] = stopping
    try:
        train(recipe)
        raise AssertionError("it did not stop")
    except Interrupted:
        pass
    finally:
        loop.__dict__["train_step"] = original_step
    train(recipe)


if __name__ == "__main__":
    torch.set_num_threads(1)
    features.SHARD_BYTES = SMALL_SHARD
    original_join, original_step = loop.join, loop.train_step
    loop.__dict__["join"] = join
    separator = sys.argv.index("--")
    for engine in sys.argv[1:separator]:
        enter(engine)
        for path in sys.argv[separator + 1 :]:
            run(path, engine)
    leave(0)
