"""Where, with what and how numbers were measured."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from eval.results import Environment
from eval.target import Target

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "numpy")


def describe_environment(target: Target, seed: int) -> Environment:
    """The machine, the versions and the command of this process."""
    device = target.runner.device
    return Environment(
        versions=versions(),
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        dtype=str(target.runner.dtype).removeprefix("torch."),
        attn_implementation=target.model.config._attn_implementation or "default",
        threads=torch.get_num_threads(),
        platform=platform.platform(),
        git_revision=git_revision(),
        command=command_line(),
        date=datetime.now(UTC),
        seed=seed,
    )


def command_line() -> str:
    """The command that started this process, as one would type it."""
    return shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])


def git_revision() -> str | None:
    """The commit this code is at, with '+' where it was changed; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        status = ["git", "status", "--porcelain"]
        dirty = subprocess.run(status, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} logical processors"
