"""scripts/vllm_draft_model.py: what is done here, and with a vLLM that only pretends; the real one where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from eval.decoding.strategies import make_drafter
from eval.prompts import Prompt
from eval.target import Target
from eval.vllm import Counted, Engine, decode_here, table, within
from layerskip_model.errors import UserError
from layerskip_model.formats.draft_model import export_draft_model
from layerskip_model.formats.huggingface import load_tokenizer
from layerskip_model.runner import Runner
from tests.eval.pretended_vllm import SCRIPTS, VLLM_PYTHON, needs_vllm, pretend, script
from tests.tiny_models import agreeing_model, tiny_model


def test_the_table(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, method="draft_model", num_hidden_layers=2)
    small = ["--num_samples", "2", "--max_steps", "12", "--num_speculations", "3", "--exit_layer", "2"]
    done = script("vllm_draft_model.py", "--run", str(finished_run), "--vllm_python", sys.executable, *small)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-6:]  # DeepSpeed, where it is installed, speaks when it is imported
    assert lines[0].split() == ["position", "vLLM", "0.0", "self_speculative", "difference"]
    assert lines[1].startswith("1         0.500 [0.500,0.500]   ")
    assert [line.split()[1] for line in lines[2:4]] == ["0.000", "0.000"]
    assert lines[4] == "vLLM's output with the draft model is its output without: 2 of 2 prompts"
    assert lines[5] == "vLLM's output without is the output here: 0 of 2 prompts"


def test_a_vllm_that_fails_or_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise ImportError('built for another torch')")
    with pytest.raises(UserError, match=r"without drafts failed \(ImportError: built for another torch\)"):
        Engine(sys.executable, tmp_path / "fails.py").run("without drafts", {})
    done = script("vllm_draft_model.py", "--vllm_python", "/no/python")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --vllm_python '/no/python' is no program")


def test_rounds_that_begin_within_the_limit_are_counted() -> None:
    """The prompt's own forward gives the first token, so that the rounds begin with 1, 4, 5 and 9."""
    won = [3, 1, 4, 2]
    assert within(won, 12) == won
    assert within(won, 9) == [3, 1, 4]
    assert within(won, 5) == [3, 1]
    assert within(won, 1) == []


def test_proposals_at_the_end_are_whole_as_in_vllm() -> None:
    """Every draft is accepted, so that rounds begin with 1 and 5 tokens, and the last one has room for one more."""
    runner = Runner(agreeing_model(layers=2, scale=0.0))
    drafter = make_drafter("self_speculative", runner, exit_layer=2, num_speculations=3)
    target = cast(Target, SimpleNamespace(runner=runner, eos_token_ids=[]))
    found = decode_here(target, drafter, [Prompt(0, "", [5, 6, 7])], 3, 6)
    assert (len(found.tokens[0]), found.proposals, found.accepted) == (6, [[2, 2, 2]], [[2, 2, 2]])


def test_shares_are_over_all_prompts() -> None:
    theirs = Counted([[]] * 2, [[4, 4], [2, 2]], [[2, 1], [1, 0]])
    ours = Counted([[]] * 2, [[4, 4], [4, 4]], [[2, 1], [2, 1]])
    rows = [line.split() for line in table("theirs", theirs, "ours", ours)[1:]]
    assert [row[0] for row in rows] == ["1", "2"]
    assert [row[1] for row in rows] == ["0.500", "0.167"]
    assert [row[3] for row in rows] == ["0.500", "0.250"]
    assert [row[5] for row in rows] == ["0.000", "-0.083"]


@needs_vllm
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
    drafting = {"method": "draft_model", "model": str(tmp_path / "draft"), "num_speculative_tokens": 2}
    for speculation in (None, drafting):
        job = {"model": str(tmp_path / "model"), "speculation": speculation, "max_steps": 8}
        (tmp_path / "job.json").write_text(json.dumps(job | {"prompts": [[5, 6, 7], [9, 8]]}))
        half = [VLLM_PYTHON, str(SCRIPTS / "vllm_decode.py")]
        subprocess.run([*half, str(tmp_path / "job.json"), str(tmp_path / "result.json")], check=True)
        found.append(json.loads((tmp_path / "result.json").read_text()))
    assert found[0]["tokens"] == found[1]["tokens"]
    assert all(0 < len(tokens) <= 8 for tokens in found[1]["tokens"])
    assert (found[0]["drafts"], min(found[1]["drafts"]) > 0) == ([0, 0], True)
