"""The end of a process: its own exit status, and nothing at all where it was launched alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from layerskip_model.processes import leave

GROUP_OF_ONE = """
import torch
from layerskip_model.processes import leave
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
print("said", flush=False)
leave({status})
print("not reached")
"""


def test_alone_it_goes_on() -> None:
    leave(3)


@pytest.mark.parametrize("status", [0, 2])
def test_in_a_group_it_ends_with_its_status_and_its_output(status: int) -> None:
    command = [sys.executable, "-c", GROUP_OF_ONE.format(status=status)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (status, "said\n")
