"""Two processes: collectives match whatever each of them drops, and the sum of their work is the whole."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def output() -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.layerskip_model.sharded_step", "fsdp", "ddp"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
@pytest.mark.parametrize("how", ["tied=False checkpointing=False", "tied=True checkpointing=True"])
def test_a_step_on_two_processes_equals_one(output: str, engine: str, how: str) -> None:
    """Loss and gradients, with layers that one rank or both drop for all their rows."""
    assert f"{engine} {how}: equal" in output
