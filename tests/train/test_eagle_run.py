"""Whole runs that train EAGLE and EAGLE-3 heads: what they leave alone, what they leave behind, and how they go on."""

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

from eval.draft_heads import load_eagle_draft
from eval.target import load_target, open_run
from layerskip_model.backbone import Backbone
from layerskip_model.formats.eagle import load_eagle
from layerskip_model.formats.fingerprint import fingerprint
from layerskip_model.formats.record import read_record
from tests.chats import PLAIN, talk
from tests.train.data_files import write_jsonl
from tests.train.tiny_heads import heads_values, write_base
from tests.train.tiny_runs import at_step, log_lines
from tests.train.tiny_runs import write_text as write_text_into
from train import Interrupted, Recipe, UserError, loop, parse_recipe, train
from train.checkpoint import list_checkpoints
from train.objectives.draft_layer import DraftLayerObjective
from train.run import Run

METHODS: dict[str, dict[str, Any]] = {
    "eagle": {"kind": "eagle", "steps": 2, "noise": 0.5},
    "eagle3": {"kind": "eagle3", "steps": 3, "feature_layers": [1, 2, 3], "draft_vocab_size": 200},
}
KINDS = list(METHODS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_into(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def base(text: Path) -> Path:
    return write_base(text / "base", text, tie_word_embeddings=True)


def recipe_of(
    output_dir: Path, text: Path, base: Path, kind: str, objective: dict[str, Any] | None = None, **changes: Any
) -> Recipe[Any]:  # fmt: skip
    return parse_recipe(heads_values(output_dir, text, base, METHODS[kind] | (objective or {}), **changes))


@pytest.fixture(scope="module")
def runs(text: Path, base: Path) -> dict[str, Path]:
    """A run of six steps of each kind."""
    kept: dict[str, Any] = {"max_steps": 6, "checkpoint": {"every": 2, "keep": 9}}
    return {kind: train(recipe_of(text / kind, text, base, kind, **kept)) for kind in KINDS}


def head_of(run: Path) -> dict[str, Tensor]:
    folder = open_run(run).heads
    assert folder is not None
    return load_file(folder / "model.safetensors")


def assert_same_heads(left: Path, right: Path, tolerance: float = 0.0) -> None:
    ours, theirs = head_of(left), head_of(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_the_head_and_the_name_of_its_model(
    kind: str, runs: dict[str, Path], base: Path
) -> None:
    told = json.loads((runs[kind] / "run.json").read_text())
    assert (told["kind"], told["base"], told["heads"]) == (kind, str(base), "export")
    assert told["fingerprint"] == fingerprint(base)
    assert told["suggested"]["strategy"] == ("eagle2" if kind == "eagle" else "eagle3")
    metrics = told["heldout_metrics"]
    assert metrics["acceptance_length"] >= 1.0
    assert {"step_1/agreement", "step_2/agreement", "step_1/top1", "step_1/top5"} <= metrics.keys()
    assert ("coverage" in metrics) == (kind == "eagle3")
    assert "bits_per_byte" not in metrics  # nothing of the model was learnt
    target = load_target(run=str(runs[kind]))
    load_eagle(runs[kind] / "export", Backbone(target.model))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_head_is_in_checkpoints_without_pickles(kind: str, runs: dict[str, Path]) -> None:
    """Everything of it learns; nothing that is written needs code to be read, but torch's state of the optimizer."""
    saved = list_checkpoints(runs[kind] / "checkpoints")
    before, after = (load_file(saved[index] / "trainable.safetensors") for index in (0, -1))
    assert all(name.startswith("module.head.") for name in after)
    assert [name for name in after if torch.equal(before[name], after[name])] == []
    optimizer = torch.load(saved[-1] / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(after)
    endings = {path.suffix for path in (runs[kind] / "export").rglob("*") if path.is_file()}
    assert not endings & {".pt", ".pth", ".bin", ".ckpt", ".pkl"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_learns_and_the_model_does_not(kind: str, text: Path, base: Path, tmp_path: Path) -> None:
    """Every byte on disk and in memory, its embedding that is its LM head too."""
    before = fingerprint(base)
    weights = load_target(model=str(base)).model.state_dict()
    seen: list[Run] = []
    original = loop.finish

    def finish(run: Run) -> None:
        seen.append(run)
        original(run)

    objective = {"noise": 0.1} if kind == "eagle" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "finish", finish)
        train(recipe_of(tmp_path / "run", text, base, kind, objective, max_steps=20))
    module: Any = seen[0].objective.module
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert all(parameter.grad is None for parameter in module.model.parameters())
    assert fingerprint(base) == before
    lines = [line for line in log_lines(tmp_path / "run") if "gradient_norm" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] * 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_however_the_batch_is_cut(kind: str, text: Path, base: Path, tmp_path: Path) -> None:
    """The noise is each row's own; each term's sum is divided by its own count over the whole batch."""
    for name, micro in (("whole", None), ("micro", 3)):
        batch = {"sequences": 8, "length": 16, "micro": micro}
        train(recipe_of(tmp_path / name, text, base, kind, batch=batch))
    assert_same_heads(tmp_path / "whole", tmp_path / "micro", 2e-5)
    logs = [[line["loss"] for line in log_lines(tmp_path / name)[:-1]] for name in ("whole", "micro")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_equals_never_stopped(
    kind: str, runs: dict[str, Path], text: Path, base: Path, tmp_path: Path
) -> None:
    """The noise and the vocabulary included, with the model's layers recomputed or not."""
    kept: dict[str, Any] = {"max_steps": 6, "checkpoint": {"every": 2, "keep": 9}}
    model = {"activation_checkpointing": True}
    recipe = recipe_of(tmp_path / "run", text, base, kind, model=model, **kept)
    with at_step(3, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train(recipe)
    train(recipe)
    assert_same_heads(tmp_path / "run", runs[kind])
    assert log_lines(tmp_path / "run") == log_lines(runs[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_may_begin_from_an_earlier_head(
    kind: str, runs: dict[str, Path], text: Path, base: Path, tmp_path: Path
) -> None:
    """Its layers and vocabulary, too; settings that say otherwise are refused."""
    still = {"kind": "adamw", "lr": 1e-12, "weight_decay": 0.0}
    earlier = {"init_heads": str(runs[kind])}
    changes: dict[str, Any] = {"max_steps": 1, "optimizer": still}
    if kind == "eagle3":
        left_open = {"feature_layers": None, "draft_vocab_size": None}
        run = train(recipe_of(tmp_path / "run", text, base, kind, earlier | left_open, **changes))
        other, expected = (
            {"draft_vocab_size": 100},
            r"objective\.draft_vocab_size: 100, and the heads of .* 200",
        )
    else:
        run = train(recipe_of(tmp_path / "run", text, base, kind, earlier, **changes))
        other, expected = {"bias": True}, r"objective\.bias: True, and the heads of init_heads .* have False"
    assert_same_heads(run, runs[kind], 1e-6)
    with pytest.raises(UserError, match=expected):
        train(recipe_of(tmp_path / "other", text, base, kind, earlier | other))
    wrong = KINDS[1 - KINDS.index(kind)]
    with pytest.raises(
        UserError, match=rf"objective\.init_heads: .* is no head for objective\.kind: {wrong}"
    ):
        train(recipe_of(tmp_path / "wrong", text, base, wrong, earlier))


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_earlier_head_has_of_its_own_goes_on(
    kind: str, runs: dict[str, Path], text: Path, base: Path, tmp_path: Path
) -> None:
    """RoPE, and where the residual is: in what is learnt, in what is written, and in the probe."""
    earlier = shutil.copytree(runs[kind] / "export", tmp_path / "earlier")
    own = {"rope_theta": 50.0, "rope_type": "default"}
    config = json.loads((earlier / "config.json").read_text())
    changed = {key: config[key] for key in config if "rope" not in key} | {"rope_theta": 50.0}
    if kind == "eagle3":
        changed["norm_before_residual"] = True
    (earlier / "config.json").write_text(json.dumps(changed))
    objective = {"init_heads": str(earlier)}
    run = train(recipe_of(tmp_path / "run", text, base, kind, objective, max_steps=2))
    config = json.loads((run / "export" / "config.json").read_text())
    assert (config["rope_parameters"], config.get("norm_before_residual")) == (
        own,
        True if kind == "eagle3" else None,
    )
    target = load_target(run=str(run))
    assert read_record(run / "export").probe is not None
    draft = load_eagle_draft(target, str(run))  # which says it again
    assert draft.heads.layer.rope is not None
    assert draft.heads.layer.rope.parameters == own


@pytest.mark.parametrize("kind", KINDS)
def test_cached_float32_features_teach_what_online_ones_do(
    kind: str, runs: dict[str, Path], text: Path, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """The same losses and exported bytes; what they will take on disk is told before they are made."""
    kept = {"cache": str(tmp_path / "cache"), "dtype": "float32"}
    run = train(recipe_of(tmp_path / "run", text, base, kind, features=kept, max_steps=6))
    assert " MB to be made" in capfd.readouterr().err
    assert_same_heads(run, runs[kind])
    assert log_lines(run) == log_lines(runs[kind])


def test_features_of_other_layers_are_refused(text: Path, tmp_path: Path) -> None:
    """Nothing in their shape would tell; nor are they an EAGLE head's."""
    base = write_base(tmp_path / "base", text, num_hidden_layers=5)
    kept: dict[str, Any] = {"features": {"cache": str(tmp_path / "cache")}, "max_steps": 1}
    train(recipe_of(tmp_path / "first", text, base, "eagle3", **kept))
    for kind, objective, states in (
        ("eagle3", {"feature_layers": [1, 2, 4]}, "layers-1-2-4-and-final"),
        ("eagle", {}, "final"),
    ):
        there = rf"^features\.cache: .*states: layers-1-2-3-and-final there, {states} here.*; name another"
        with pytest.raises(UserError, match=there):
            train(recipe_of(tmp_path / kind, text, base, kind, objective, **kept))


def test_only_answers_are_learnt(text: Path, tmp_path: Path) -> None:
    """By the template's own spans, no search in the text: a user who writes the marks of a turn changes nothing."""
    marks = "ASSISTANT: qq"
    talks = [{"m": talk(f"qqqq {marks}", f"no{i}", "qqq", "yes")} for i in range(24)]
    rows = write_jsonl(tmp_path / "talks.jsonl", talks)
    source = {"kind": "jsonl", "files": [str(rows)], "conversation": "m"}
    base = write_base(tmp_path / "base", text, template=PLAIN)
    seen: list[dict[str, Tensor]] = []
    original = DraftLayerObjective.count

    def count(self: Any, batch: dict[str, Tensor]) -> dict[str, int]:
        seen.append({"input_ids": batch["input_ids"], "learnt": self.labels(batch)[0]})
        return original(self, batch)

    changes: dict[str, Any] = {"data": {"train": [source], "heldout": 0.2}, "max_steps": 1}
    changes["batch"] = {"sequences": 2, "length": 128}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftLayerObjective, "count", count)
        train(recipe_of(tmp_path / "run", text, base, "eagle3", **changes))
    learnt = [token for each in seen for token in each["learnt"].flatten().tolist() if token >= 0]
    written = load_target(model=str(base)).tokenizer.decode(learnt)
    assert "q" not in written
    assert "ASSISTANT" not in written
    assert "yes" in written


def test_it_decodes_while_it_trains_and_counts_the_bonus_token(
    runs: dict[str, Path], text: Path, base: Path, tmp_path: Path
) -> None:
    """An acceptance length beside an acceptance rate: each forward gives the bonus token and what was accepted."""
    decode = {"prompts": 2, "new_tokens": 8, "num_speculations": 2}
    run = train(
        recipe_of(tmp_path / "run", text, base, "eagle", max_steps=2, evaluate={"every": 1, "decode": decode})
    )
    told = [line for line in log_lines(run) if "decode/acceptance_length" in line]
    assert told
    for line in told:
        assert line["decode/equal_tokens"] == 1.0
        length, rate = line["decode/acceptance_length"], line["decode/acceptance_rate"]
        assert 1.0 <= length <= 3.0
        assert (length == 1.0) == (rate == 0.0)


def test_what_cannot_be_is_told_before_anything_is_written(text: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^objective\.draft_vocab_size: 5000 tokens can not be chosen of the"
    ):
        train(recipe_of(tmp_path / "run", text, base, "eagle3", {"draft_vocab_size": 5000}))
    assert not (tmp_path / "run").exists()
