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
from layerskip_model.formats.huggingface import QUANTIZATIONS

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "numpy")


def describe_environment(target: Target, seed: int) -> Environment:
    """The machine, the versions and the command of this process."""
    device = target.runner.device
    return Environment(
        versions=versions(),
        device=_places(target),
        device_name=device_name(device),
        dtype=_dtype(target),
        attn_implementation=target.model.config._attn_implementation or "default",
        threads=torch.get_num_threads(),
        platform=platform.platform(),
        git_revision=git_revision(),
        command=command_line(),
        date=datetime.now(UTC),
        seed=seed,
    )


def device_name(device: torch.device) -> str:
    """What the device is sold as."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


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


def _places(target: Target) -> str:
    """The device, or all that the model is spread over, "disk" among them."""
    spread = getattr(target.model, "hf_device_map", {}).values()
    places = [f"cuda:{place}" if isinstance(place, int) else str(place) for place in spread]
    return ", ".join(dict.fromkeys(places)) or str(target.runner.device)


def _dtype(target: Target) -> str:
    """What is computed in, and how the weights are stored where they are quantized."""
    name = str(target.runner.dtype).removeprefix("torch.")
    config = getattr(target.model.config, "quantization_config", None)
    if config is None:
        return name
    stored = config if isinstance(config, dict) else config.to_dict()
    method = getattr(stored["quant_method"], "value", stored["quant_method"])
    bits = "".join(f"{kind} " for kind in QUANTIZATIONS if stored.get(f"load_in_{kind}"))
    return f"{name}, {bits}weights of {method}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} logical processors"
