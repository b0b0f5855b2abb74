"""scripts/vllm_draft_model.py: what is done here, and with a vLLM that only pretends; the real one where it is."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from layerskip_model.errors import UserError
from layerskip_model.formats.draft_model import export_draft_model
from layerskip_model.formats.huggingface import load_tokenizer
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "scripts"
VLLM_PYTHON = os.environ.get("VLLM_PYTHON")  # vLLM wants another torch, so an environment of its own
PRETENDED = '''
"""A vLLM without a draft model's help, which says what job it got."""
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
            assert config["num_hidden_layers"] == 2, config
            assert speculative_config["method"] == "draft_model"

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


def script(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "vllm_draft_model.py"), "--run", str(run), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `vllm` that scripts find: its file, to be changed."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    (tmp_path / "vllm.py").write_text(PRETENDED)
    return tmp_path / "vllm.py"


def test_the_table(finished_run: Path, pretended: Path) -> None:
    small = ["--num_samples", "2", "--max_steps", "12", "--num_speculations", "3", "--exit_layer", "2"]
    done = script(finished_run, "--vllm_python", sys.executable, *small)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-6:]  # DeepSpeed, where it is installed, speaks when it is imported
    assert lines[0].split() == ["position", "vLLM", "0.0", "self_speculative", "difference"]
    assert lines[1].startswith("1         0.500 [0.500,0.500]   ")
    assert [line.split()[1] for line in lines[2:4]] == ["0.000", "0.000"]
    assert lines[4].endswith(": 2 of 2 prompts")  # it says the same with the draft model as without
    assert lines[5].endswith(": 0 of 2 prompts")


def test_a_vllm_that_fails_or_is_not_there(finished_run: Path, pretended: Path) -> None:
    pretended.write_text("raise ImportError('built for another torch')")
    decode_in_vllm = runpy.run_path(str(SCRIPTS / "vllm_draft_model.py"))["decode_in_vllm"]
    with pytest.raises(
        UserError, match=r"without draft model failed \(ImportError: built for another torch\)"
    ):
        decode_in_vllm(sys.executable, pretended.parent, "without", {})
    done = script(finished_run, "--vllm_python", "/no/python")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --vllm_python '/no/python' is no program")


@pytest.mark.skipif(VLLM_PYTHON is None, reason="VLLM_PYTHON names no Python of an environment with vLLM")
def test_the_half_that_vllm_runs(finished_run: Path, tmp_path: Path) -> None:
    """With the model's own first layer as the draft model it says what it says without."""
    assert VLLM_PYTHON is not None
    tokenizer = load_tokenizer(str(finished_run / "export"))
    sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 32}  # vLLM knows no smaller heads on a CPU
    model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), **sizes)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_draft_model(str(tmp_path / "model"), 1, tmp_path / "draft")
    found = []
    for draft in (None, str(tmp_path / "draft")):
        job = {"model": str(tmp_path / "model"), "draft": draft, "num_speculations": 2, "max_steps": 8}
        (tmp_path / "job.json").write_text(json.dumps(job | {"prompts": [[5, 6, 7], [9, 8]]}))
        half = [VLLM_PYTHON, str(SCRIPTS / "vllm_decode.py")]
        subprocess.run([*half, str(tmp_path / "job.json"), str(tmp_path / "result.json")], check=True)
        found.append(json.loads((tmp_path / "result.json").read_text()))
    assert found[0]["tokens"] == found[1]["tokens"]
    assert all(0 < len(tokens) <= 8 for tokens in found[1]["tokens"])
    assert (found[0]["drafts"], min(found[1]["drafts"]) > 0) == ([0, 0], True)
