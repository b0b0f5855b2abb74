"""scripts/vllm_heads.py, with a vLLM that only pretends; the real one where it is."""

from __future__ import annotations

import json
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.eagle import EagleHead
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.errors import UserError
from layerskip_model.formats.eagle import write_eagle
from layerskip_model.formats.fingerprint import fingerprint
from layerskip_model.formats.huggingface import load_model, load_tokenizer
from layerskip_model.formats.medusa import write_medusa
from layerskip_model.medusa import MedusaHeads
from scripts.vllm_heads import main
from tests.eval.decoding.eagle_heads import fitted_head
from tests.eval.decoding.medusa_heads import fitted_heads
from tests.eval.decoding.test_speculate import naive_greedy
from tests.eval.pretended_vllm import VLLM_PYTHON, needs_vllm, pretend, script
from tests.layerskip_model.tiny_eagle import READS, Head, half_of
from tests.tiny_models import agreeing_model, tiny_model

PROMPTS = ("def anna(", "return value", "x", "def def def")
NEW = 40


def write_medusa_heads(directory: Path, heads: MedusaHeads, base: Path) -> Path:
    """Heads for the model that was saved there, in float32."""
    directory.mkdir()
    state = heads.state_dict()
    weights = fingerprint(base)
    write_medusa(directory, heads, state, dtype=torch.float32, base=str(base), base_fingerprint=weights)
    return directory


def fitted_medusa(model: PreTrainedModel, texts: list[list[int]], shared: bool) -> MedusaHeads:
    """Three heads of which some drafts are right; with one projection for all, that of the first."""
    heads = fitted_heads(model, texts)
    if not shared:
        return heads
    alike = MedusaHeads.new(Backbone(model), heads=heads.number, layers=1, shared=True)
    alike.load_state_dict(heads.state_dict(), strict=False)
    return alike


def write_eagle_head(directory: Path, head: Head, model: PreTrainedModel, base: Path) -> Path:
    """A head for the model that was saved there, in float32."""
    directory.mkdir()
    write_eagle(
        directory,
        head,
        head.state_dict(),
        dtype=torch.float32,
        backbone=Backbone(model),
        base=str(base),
        base_fingerprint=fingerprint(base),
    )
    return directory


def passing_on(model: PreTrainedModel) -> EagleHead:
    """A head that hands on the embedding, and so is right of a model whose layers change little; noise else.

    Its features, its bias and what it attends to make it wrong here and there.
    """
    torch.manual_seed(0)
    head = EagleHead(Backbone(model)).to(model.dtype)
    for name, weight in head.named_parameters():
        if "norm" not in name:
            weight.data.normal_(std=1.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 0.02)
    head.fc.weight.data += torch.eye(*head.fc.weight.shape)
    return head.requires_grad_(False).eval()


def check_table(finished_run: Path, heads: Path, ours: str, *flags: str) -> None:
    """What the script prints of a vLLM that accepts the first draft every other time."""
    arguments = ["--run", str(finished_run), "--draft", str(heads), "--num_samples", "2", "--max_steps", "12"]
    done = script("vllm_heads.py", "--vllm_python", sys.executable, *arguments, *flags)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-6:]  # DeepSpeed, where it is installed, speaks when it is imported
    assert lines[0].split() == ["position", "vLLM", "0.0", ours, "difference"]
    assert lines[1].startswith("1         0.500 [0.500,0.500]   ")
    assert [line.split()[1] for line in lines[2:4]] == ["0.000", "0.000"]
    assert lines[4] == "vLLM's output with the heads is its output without: 2 of 2 prompts"


@pytest.mark.parametrize("shared", [False, True])
def test_the_table_of_medusa(
    shared: bool, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path, monkeypatch, method="medusa", num_heads=3, original_lm_head=shared)
    base = finished_run / "export"
    made = MedusaHeads.new(Backbone(load_model(str(base))), heads=3, layers=1, shared=shared)
    heads = write_medusa_heads(tmp_path / "heads", made, base)
    check_table(finished_run, heads, "medusa:tree=chain")


def test_the_table_of_eagle(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three drafts are asked for on both sides."""
    expected = {"method": "eagle", "num_speculative_tokens": 3, "architectures": ["EagleLlamaForCausalLM"]}
    pretend(tmp_path, monkeypatch, **expected)
    base = finished_run / "export"
    model = load_model(str(base))
    heads = write_eagle_head(tmp_path / "heads", EagleHead(Backbone(model), bias=False), model, base)
    check_table(finished_run, heads, "eagle2:tree_top_k=1", "--num_speculations", "3")


@pytest.mark.parametrize("form", ["vllm", "speculators"])
def test_the_table_of_eagle3(
    form: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = finished_run / "export"
    model = load_model(str(base))
    backbone = Backbone(model)
    vocabulary = half_of(backbone.vocab_size)
    own: dict[str, dict[str, Any]] = {
        "vllm": {"architectures": ["LlamaForCausalLMEagle3"]},
        "speculators": {"speculators_model_type": "eagle3"},
    }
    sizes = {"num_speculative_tokens": 3, "draft_vocab_size": vocabulary.size}
    pretend(tmp_path, monkeypatch, method="eagle3", **sizes, **own[form])
    heads = write_eagle_head(tmp_path / "heads", Eagle3Head(backbone, vocabulary, READS), model, base)
    check_table(finished_run, heads, "eagle3:tree_top_k=1", "--num_speculations", "3", "--to", form)


def test_what_vllm_cannot_draft_with_is_said(tmp_path: Path) -> None:
    none, medusa = str(tmp_path / "none"), str(tmp_path / "medusa")
    Path(none).mkdir()
    Path(medusa).mkdir()
    (Path(medusa) / "config.json").write_text('{"medusa_num_heads": 3}')
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "--draft is missing: name heads for --model, or the --run that trained them"),
        ({"draft": none}, f"--draft '{none}': these are no Medusa, EAGLE or EAGLE-3 heads; name some"),
        ({"draft": medusa, "to": "speculators"}, "--to 'speculators': vLLM loads medusa heads as vllm"),
        (
            {"draft": medusa, "num_speculations": 2},
            "--num_speculations 2: each Medusa head drafts a token; leave it out",
        ),
    ]
    for flags, told in cases:
        with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
            main(sys.executable, str(tmp_path), **flags)


@needs_vllm
@pytest.mark.parametrize("kind", ["medusa", "medusa, shared", "eagle", "eagle3", "eagle3, speculators"])
def test_vllm_accepts_what_is_accepted_here(kind: str, finished_run: Path, tmp_path: Path) -> None:
    """Every proposal, of heads of which some are right and some wrong. The EAGLE head has a bias, vLLM's has none."""
    assert VLLM_PYTHON is not None
    method, _, variant = kind.partition(", ")
    tokenizer = load_tokenizer(str(finished_run / "export"))
    sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 32}  # vLLM knows no smaller heads on a CPU
    sizes["vocab_size"] = len(tokenizer)
    model = agreeing_model(layers=0, scale=0.003, **sizes) if method == "eagle" else tiny_model(**sizes)
    base, place = tmp_path / "model", tmp_path / "heads"
    deepcopy(model).float().save_pretrained(base)
    tokenizer.save_pretrained(base)
    prompts = tokenizer(list(PROMPTS[:2]))["input_ids"]
    learnt = [prompt + naive_greedy(model, prompt, NEW) for prompt in prompts]
    flags = ["--num_speculations", "3", "--to", variant or "vllm"]
    if method == "medusa":
        heads = write_medusa_heads(place, fitted_medusa(model, learnt, variant == "shared"), base)
        flags = []
    elif method == "eagle":
        heads = write_eagle_head(place, passing_on(model), model, base)
    else:
        heads = write_eagle_head(place, fitted_head(method, model, learnt), model, base)
    rows = [json.dumps({"prompt": text}) + "\n" for text in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    where = ["--model", str(base), "--draft", str(heads), "--dataset", str(tmp_path / "prompts.jsonl")]
    done = script("vllm_heads.py", "--vllm_python", VLLM_PYTHON, *where, "--max_steps", str(NEW), *flags)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-6:]
    shares = [float(line.split()[1]) for line in lines[1:4]]
    assert 1.0 > shares[0] >= shares[1] >= shares[2] > 0.0  # else there is little to compare
    assert [line.split()[-2:] for line in lines[1:4]] == [["0.000", "[0.000,0.000]"]] * 3
    assert [line.endswith(": 4 of 4 prompts") for line in lines[4:]] == [True, True]
