"""scripts/vllm_medusa.py, with a vLLM that only pretends; the real one where it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.formats.fingerprint import fingerprint
from layerskip_model.formats.huggingface import load_model, load_tokenizer
from layerskip_model.formats.medusa import write_medusa
from layerskip_model.medusa import MedusaHeads
from tests.eval.pretended_vllm import VLLM_PYTHON, needs_vllm, pretend, script
from tests.tiny_models import tiny_model


def write_heads(directory: Path, model: PreTrainedModel, base: Path, shared: bool, noise: float) -> Path:
    """Three heads of a block that say about what the LM head says, which in texts that repeat is right."""
    torch.manual_seed(5)
    heads = MedusaHeads.new(Backbone(model), heads=3, layers=1, shared=shared)
    for parameter in heads.parameters():
        parameter.data += noise * torch.randn(parameter.shape)
    directory.mkdir()
    state = heads.state_dict()
    weights = fingerprint(base)
    write_medusa(directory, heads, state, dtype=torch.float32, base=str(base), base_fingerprint=weights)
    return directory


@pytest.mark.parametrize("shared", [False, True])
def test_the_table(shared: bool, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, method="medusa", num_heads=3, original_lm_head=shared)
    base = finished_run / "export"
    heads = write_heads(tmp_path / "heads", load_model(str(base)), base, shared, noise=0.1)
    arguments = ["--run", str(finished_run), "--draft", str(heads), "--num_samples", "2", "--max_steps", "12"]
    done = script("vllm_medusa.py", "--vllm_python", sys.executable, *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-6:]  # DeepSpeed, where it is installed, speaks when it is imported
    assert lines[0].split() == ["position", "vLLM", "0.0", "medusa:tree=chain", "difference"]
    assert lines[1].startswith("1         0.500 [0.500,0.500]   ")
    assert [line.split()[1] for line in lines[2:4]] == ["0.000", "0.000"]
    assert lines[4] == "vLLM's output with the heads is its output without: 2 of 2 prompts"


def test_without_heads_it_says_so(tmp_path: Path) -> None:
    done = script("vllm_medusa.py", "--vllm_python", sys.executable, "--model", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --draft is missing: name Medusa heads")


@needs_vllm
@pytest.mark.parametrize("shared", [False, True])
def test_vllm_accepts_what_is_accepted_here(shared: bool, finished_run: Path, tmp_path: Path) -> None:
    """Every proposal, of heads of which some are right and some wrong."""
    assert VLLM_PYTHON is not None
    tokenizer = load_tokenizer(str(finished_run / "export"))
    sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 32}  # vLLM knows no smaller heads on a CPU
    model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), **sizes)
    base = tmp_path / "model"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    heads = write_heads(tmp_path / "heads", model, base, shared, noise=0.05)
    rows = [json.dumps({"prompt": text}) + "\n" for text in ("def anna(", "return value", "x", "def def def")]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    where = ["--model", str(base), "--draft", str(heads), "--dataset", str(tmp_path / "prompts.jsonl")]
    done = script("vllm_medusa.py", "--vllm_python", VLLM_PYTHON, *where, "--max_steps", "40")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-6:]
    first = [float(line.split()[1]) for line in lines[1:4]]
    assert 0.0 < first[-1] <= first[0] < 1.0
    assert [line.split()[-2:] for line in lines[1:4]] == [["0.000", "[0.000,0.000]"]] * 3
    assert [line.endswith(": 4 of 4 prompts") for line in lines[4:]] == [True, True]
