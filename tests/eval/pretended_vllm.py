"""A vLLM that only pretends, for tests of the scripts that run one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "scripts"
VLLM_PYTHON = os.environ.get("VLLM_PYTHON")  # vLLM wants another torch, so an environment of its own
needs_vllm = pytest.mark.skipif(
    VLLM_PYTHON is None, reason="VLLM_PYTHON names no Python of an environment with vLLM"
)
PRETENDED = '''
"""A vLLM that accepts the first of two drafts every other time, and checks what it is given."""
import json, os, sys

class SamplingParams:
    def __init__(self, temperature, max_tokens):
        assert temperature == 0.0
        self.max_tokens = max_tokens

class Row:
    pass

class Counter:
    def __init__(self, name, value):
        self.name, self.value, self.values = name, value, value

class LLM:
    def __init__(self, model, speculative_config=None, **options):
        self.speculation, self.drafts = speculative_config, 0
        if speculative_config:
            config = json.load(open(os.path.join(speculative_config["model"], "config.json")))
            given = speculative_config | config
            for key, value in EXPECTED.items():
                assert given[key] == value, (key, given)

    def generate(self, prompts, params, use_tqdm):
        self.drafts += 2
        output, request = Row(), Row()
        output.token_ids = [1] * params.max_tokens
        request.outputs = [output]
        return [request]

    def get_metrics(self):
        if self.speculation is None:
            return []
        n = self.speculation["num_speculative_tokens"]
        return [
            Counter("vllm:spec_decode_num_drafts", self.drafts),
            Counter("vllm:spec_decode_num_accepted_tokens_per_pos", [self.drafts // 2] + [0] * (n - 1)),
        ]

__version__ = "0.0"
'''


def pretend(place: Path, monkeypatch: pytest.MonkeyPatch, **expected: object) -> None:
    """A `vllm` that scripts find, which wants these values in the speculative model's configuration."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{place}")
    (place / "vllm.py").write_text(f"{PRETENDED}\nEXPECTED = {expected!r}\n")


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script of scripts/ as a user has it."""
    return subprocess.run([sys.executable, str(SCRIPTS / name), *arguments], capture_output=True, text=True)
