"""Whole runs that train Medusa heads: what they leave alone, what they leave behind, and how they go on."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from eval.target import load_target, open_run
from layerskip_model.backbone import Backbone
from layerskip_model.formats.fingerprint import fingerprint
from layerskip_model.formats.medusa import load_medusa
from tests.chats import PLAIN, talk
from tests.train.data_files import write_jsonl
from tests.train.tiny_heads import medusa_values, write_base
from tests.train.tiny_runs import at_step, log_lines, start, write_recipe
from tests.train.tiny_runs import write_text as write_text_into
from train import Interrupted, UserError, loop, parse_recipe, train
from train.checkpoint import list_checkpoints
from train.objectives.medusa import Medusa
from train.run import Run

LORA: dict[str, Any] = {"lora": {"rank": 2}}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_into(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def base(text: Path) -> Path:
    return write_base(text / "base", text, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def first(text: Path, base: Path) -> Path:
    """A run of stage: heads, by the program."""
    values = medusa_values(text / "first", text, base, max_steps=6, checkpoint={"every": 2, "keep": 9})
    process = start("-m", "train", str(write_recipe(text / "first.yaml", values)))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert " MB each" in error
    return text / "first"


def heads_of(run: Path) -> dict[str, Tensor]:
    folder = open_run(run).heads
    assert folder is not None
    return load_file(folder / "medusa_lm_head.safetensors")


def assert_close_heads(left: Path, right: Path) -> None:
    ours, theirs = heads_of(left), heads_of(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=2e-5)


def test_a_run_leaves_the_heads_and_the_name_of_their_model(first: Path, base: Path) -> None:
    told = json.loads((first / "run.json").read_text())
    assert (told["kind"], told["base"], told["heads"]) == ("medusa", str(base), "export")
    assert told["fingerprint"] == fingerprint(base)
    assert told["suggested"]["strategy"] == "medusa"
    assert told["heldout_metrics"]["acceptance_length"] >= 1.0
    assert "bits_per_byte" not in told["heldout_metrics"]  # nothing of the model was learnt
    files = open_run(first)
    assert (files.model, files.heads) == (base, first / "export")
    target = load_target(run=str(first))
    heads = load_medusa(first / "export", Backbone(target.model))
    assert (heads.number, heads.layers) == (3, 1)


def test_only_heads_are_in_checkpoints(first: Path, base: Path) -> None:
    saved = list_checkpoints(first / "checkpoints")
    assert [path.name for path in saved] == ["step-00000002", "step-00000004", "step-00000006"]
    state = load_file(saved[-1] / "trainable.safetensors")
    assert all(name.startswith("module.heads.") for name in state)
    exported = heads_of(first)
    assert len(state) == len(exported) == 3 * 3
    assert torch.equal(state["module.heads.blocks.1.0.linear.bias"], exported["1.0.linear.bias"])
    optimizer = torch.load(saved[-1] / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == 3 * 3


def test_heads_learn_and_the_model_does_not(first: Path, text: Path, base: Path, tmp_path: Path) -> None:
    """Every byte of it, the LM head's too, in memory and on disk; nothing of it has a gradient."""
    before = fingerprint(base)
    weights = {
        name: value.clone() for name, value in AutoModelForCausalLM.from_pretrained(base).state_dict().items()
    }
    seen: list[Run] = []
    original = loop.finish

    def finish(run: Run) -> None:
        seen.append(run)
        original(run)

    recipe = parse_recipe(medusa_values(tmp_path / "run", text, base, max_steps=20))
    loop.__dict__["finish"] = finish
    try:
        train(recipe)
    finally:
        loop.__dict__["finish"] = original
    objective = seen[0].objective
    assert isinstance(objective, Medusa)
    for name, value in objective.module.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert all(parameter.grad is None for parameter in objective.module.model.parameters())
    assert fingerprint(base) == before
    lines = [line for line in log_lines(tmp_path / "run") if "head_3/loss" in line]
    assert lines[-1]["head_3/loss"] < lines[0]["head_3/loss"] - 0.1
    exported, head = heads_of(tmp_path / "run"), weights["lm_head.weight"]
    assert all(not torch.equal(exported[f"{k}.1.weight"], head) for k in range(3))
    assert all(exported[f"{k}.0.linear.{part}"].any() for k in range(3) for part in ("weight", "bias"))
    assert not torch.equal(exported["0.0.linear.weight"], exported["1.0.linear.weight"])


@pytest.mark.parametrize("objective", [{}, {"shared_projection": True, "layers": 2}])
def test_however_the_batch_is_cut(objective: dict[str, Any], text: Path, base: Path, tmp_path: Path) -> None:
    """Each head's sum is divided by its own count over the whole batch."""
    for name, micro in (("whole", None), ("micro", 3)):
        batch = {"sequences": 8, "length": 16, "micro": micro}
        train(parse_recipe(medusa_values(tmp_path / name, text, base, objective=objective, batch=batch)))
    assert_close_heads(tmp_path / "whole", tmp_path / "micro")
    logs = [[line["loss"] for line in log_lines(tmp_path / name)[:-1]] for name in ("whole", "micro")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_stopped_equals_never_stopped(first: Path, text: Path, base: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(
        medusa_values(tmp_path / "run", text, base, max_steps=6, checkpoint={"every": 2, "keep": 9})
    )
    with at_step(3, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train(recipe)
    train(recipe)
    ours, theirs = heads_of(tmp_path / "run"), heads_of(first)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log_lines(tmp_path / "run") == log_lines(first)


def test_a_second_stage_trains_adapters_and_heads(
    first: Path, text: Path, base: Path, tmp_path: Path
) -> None:
    """From the first stage's heads; the export is a plain merged model, its heads are for that one."""
    objective = {
        "stage": "joint",
        "init_heads": str(first),
        "self_distillation": True,
        "lambda_0": 0.01,
        "ramp": "sine",
    }
    run = train(
        parse_recipe(
            medusa_values(tmp_path / "run", text, base, model=LORA, objective=objective, max_steps=6)
        )
    )
    steps = [line for line in log_lines(run) if "lm/loss" in line]
    assert steps[0]["lm/loss"] == pytest.approx(0.0, abs=1e-5)  # the adapters begin at zero: no divergence
    assert steps[-1]["lm/loss"] > 0.0
    assert steps[0]["lambda_0"] == 0.0
    assert steps[-1]["lambda_0"] > 0.0
    files = open_run(run)
    assert (files.model, files.heads) == (run / "export", run / "export" / "heads")
    state = load_file(list_checkpoints(run / "checkpoints")[-1] / "trainable.safetensors")
    assert all(name.startswith("module.heads.") or "lora_" in name for name in state)
    merged = load_target(run=str(run)).model
    assert {"lora_A" in name for name in merged.state_dict()} == {False}
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not changed & {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    load_medusa(run / "export" / "heads", Backbone(merged))
    with pytest.raises(UserError, match="its fingerprint differs"):
        load_medusa(run / "export" / "heads", Backbone(AutoModelForCausalLM.from_pretrained(base)))


def test_a_second_stage_may_train_the_whole_model(
    first: Path, text: Path, base: Path, tmp_path: Path
) -> None:
    objective = {"stage": "joint", "init_heads": str(first / "export"), "head_lr_multiple": 2.0}
    values = medusa_values(tmp_path / "run", text, base, objective=objective, max_steps=2)
    run = train(parse_recipe(values))
    weights, before = load_target(run=str(run)).model.state_dict(), None
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    } <= changed  # tied, and trained
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert "bits_per_byte" in json.loads((run / "run.json").read_text())["heldout_metrics"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("cut", r"medusa_lm_head\.safetensors is cut short"),
        ("heads", r"objective\.heads: 2, and the heads of init_heads .* have 3"),
        ("fingerprint", r"its fingerprint differs"),
        ("run", r"init_heads: heads .*: that run trained no heads"),
    ],
)
def test_heads_that_do_not_fit_are_not_begun_from(
    damage: str, expected: str, first: Path, text: Path, base: Path, tmp_path: Path
) -> None:
    heads = tmp_path / "heads"
    shutil.copytree(first / "export", heads)
    told = json.loads((heads / "config.json").read_text())
    if damage == "cut":
        path = heads / "medusa_lm_head.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "fingerprint":
        (heads / "config.json").write_text(json.dumps(told | {"base_fingerprint": "0"}))
    elif damage == "run":
        content = json.loads((first / "run.json").read_text()) | {"heads": None}
        (heads / "run.json").write_text(json.dumps(content))
    objective = {"stage": "joint", "init_heads": str(heads), "heads": 2 if damage == "heads" else 3}
    with pytest.raises(UserError, match=expected):
        train(parse_recipe(medusa_values(tmp_path / "run", text, base, objective=objective)))


def test_only_answers_are_learnt_with_the_token_that_ends_them(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """User turns count nothing, though padding and the end of a turn are the same token."""
    talks = [{"m": talk("qqqq", f"no{i}", "qqq", "yes")} for i in range(24)]
    source = {
        "kind": "jsonl",
        "files": [str(write_jsonl(tmp_path / "talks.jsonl", talks))],
        "conversation": "m",
    }
    base = write_base(tmp_path / "base", text, template=PLAIN)
    seen: list[dict[str, Tensor]] = []
    original = Medusa.count

    def count(self: Medusa, batch: dict[str, Tensor]) -> dict[str, int]:
        seen.append(batch)
        return original(self, batch)

    monkeypatch.setattr(Medusa, "count", count)
    data = {"train": [source], "heldout": 0.2}
    batch = {"sequences": 2, "length": 96}
    train(parse_recipe(medusa_values(tmp_path / "run", text, base, data=data, batch=batch, max_steps=1)))
    target = load_target(model=str(base))
    (eos,) = target.eos_token_ids
    learnt = [label for each in seen for label in each["labels"].flatten().tolist() if label >= 0]
    written = target.tokenizer.decode(learnt)
    assert "q" not in written
    assert "USER" not in written
    assert "yes" in written
    assert learnt.count(eos) >= 4  # every answer ends


def test_a_conversation_whose_answer_does_not_fit_is_no_nan(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is left out, with a word, so that no micro-batch, here of one row, is without labels."""
    talks = [{"m": talk("q" * (90 if i % 3 == 0 else 3), f"yes {i}")} for i in range(24)]
    rows = write_jsonl(tmp_path / "talks.jsonl", talks)
    source = {"kind": "jsonl", "files": [str(rows)], "conversation": "m"}
    base = write_base(tmp_path / "base", text, template=PLAIN)
    seen: list[dict[str, int]] = []
    original = Medusa.count

    def count(self: Medusa, batch: dict[str, Tensor]) -> dict[str, int]:
        seen.append(original(self, batch))
        return seen[-1]

    monkeypatch.setattr(Medusa, "count", count)
    data = {"train": [source], "heldout": 0.2}
    batch = {"sequences": 4, "length": 36, "micro": 1}
    run = train(parse_recipe(medusa_values(tmp_path / "run", text, base, data=data, batch=batch)))
    assert "left out, as nothing to predict remained" in capsys.readouterr().err
    assert all(min(counts.values()) > 0 for counts in seen)
    losses = [line[f"head_{k}/loss"] for line in log_lines(run) if "learning_rate" in line for k in (1, 2, 3)]
    assert len(losses) == 4 * 3
    assert all(0 < loss < 100 for loss in losses)


def test_a_conversation_without_answers_is_an_error(text: Path, base: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "talks.jsonl", [{"m": talk("hi")} for _ in range(8)])
    source = {"kind": "jsonl", "files": [str(rows)], "conversation": "m"}
    template = tmp_path / "chat.jinja"
    template.write_text(PLAIN)
    data = {"train": [source], "heldout": 0.2, "skip_malformed": 99, "chat_template": str(template)}
    values = medusa_values(tmp_path / "run", text, base, data=data)
    process = start("-m", "train", str(write_recipe(tmp_path / "recipe.yaml", values)))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error
