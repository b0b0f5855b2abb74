"""What a report says about where it was measured."""

from __future__ import annotations

import copy
import dataclasses
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from eval import environment
from eval.environment import command_line, describe_environment, git_revision, versions
from eval.target import Target


def test_the_environment_is_this_one(tiny_target: Target) -> None:
    found = describe_environment(tiny_target, seed=3)
    assert found.device == "cpu"
    assert found.dtype == "float64"
    assert found.threads == torch.get_num_threads()
    assert found.seed == 3
    assert found.attn_implementation == "sdpa"
    assert "logical processors" in found.device_name
    assert found.date.tzinfo is not None
    assert found.versions["python"] == platform.python_version()
    assert found.versions["torch"] == version("torch")


def test_a_model_that_is_quantized_and_spread_is_described_so(tiny_target: Target) -> None:
    model: Any = copy.copy(tiny_target.model)
    model.config = copy.copy(model.config)
    target = dataclasses.replace(tiny_target, model=model)
    for how, expected in (
        (BitsAndBytesConfig(load_in_4bit=True), "float64, 4bit weights of bitsandbytes"),
        (BitsAndBytesConfig(load_in_8bit=True).to_dict(), "float64, 8bit weights of bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "float64, weights of gptq"),
    ):
        model.config.quantization_config = how
        assert describe_environment(target, seed=3).dtype == expected
    model.hf_device_map = {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "lm_head": "disk",
    }
    assert describe_environment(target, seed=3).device == "cuda:0, cuda:1, disk"


def test_packages_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert set(versions()) == {"python", "torch"}


def test_the_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/x/python3")
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "eval", "generate", "--prompt", "it's a b"])
    assert command_line() == "python3 -m eval generate --prompt 'it'\"'\"'s a b'"


def test_the_revision_says_whether_the_code_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "file.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision() is None  # not a checkout
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    clean = git_revision()
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "file.py").write_text("")
    assert git_revision() == clean + "+"
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None  # no git
