"""A dry run says everything, loads nothing and writes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from layerskip_model.errors import UserError
from tests.tiny_models import tiny_model
from tests.train.small_recipe import small_values, write_documents
from tests.train.tiny_runs import start, write_recipe
from train.__main__ import main
from train.config import parse_recipe
from train.data.tokenizer import train_tokenizer


def shown(capsys: pytest.CaptureFixture[str], ranks: int = 1, **changes: Any) -> str:
    """What a dry run of `small_values` prints, in a window of 80 columns."""
    from rich.console import Console

    from train.dry_run import dry_run

    dry_run(parse_recipe(small_values(**changes)), ranks, Console(width=80, highlight=False))
    return capsys.readouterr().out


def test_the_program_prints_a_page_and_writes_nothing(tmp_path: Path) -> None:
    values = small_values(output_dir=str(tmp_path / "out"))
    values["data"]["train"][0]["files"] = write_documents(tmp_path)
    path = write_recipe(tmp_path / "recipe.yaml", values)
    before = sorted(tmp_path.rglob("*"))
    plain = {"COLUMNS": "80", "NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    process = start("-m", "train", str(path), "seed=3", "--dry_run", "--ranks", "3", **plain)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert max(map(len, output.splitlines())) <= 80
    assert output.isascii()
    assert "\x1b" not in output
    for part in ("seed: 3", "Model", "Optimizer", "Run", "Memory", "FSDP2", "Schedule", "layer dropout"):
        assert part in output, part
    assert "first document" in output
    assert sorted(tmp_path.rglob("*")) == before


def test_ranks_are_for_dry_runs(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", small_values())
    with pytest.raises(UserError, match=r"^--ranks 2 is for --dry_run"):
        main(str(path), [], ranks=2)


def test_sizes_steps_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, max_steps=None, max_tokens=1000, batch={"sequences": 8, "length": 16, "micro": 3})
    assert "a step: 8 sequences of 16 tokens, 128 in all" in text
    assert "steps: 8, 1,024 tokens" in text
    assert "a rank of 1: 3 + 3 + 2 sequences" in text
    hidden, inner, vocabulary = 16, 32, 280
    layer = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    assert f"{3 * layer + 2 * vocabulary * hidden + hidden:,}" in text
    assert f"{layer:,}" in text
    assert [line.split()[1:3] for line in text.splitlines() if line.startswith(" adamw")] == [
        ["23", f"{3 * (layer - 2 * hidden) + 2 * vocabulary * hidden:,}"],
        ["7", f"{7 * hidden}"],
    ]
    assert "one process" in text
    assert max(map(len, text.splitlines())) <= 80


def test_epochs_need_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"train": [{"kind": "text", "files": ["missing-*"]}]}
    text = shown(capsys, ranks=4, max_steps=None, epochs=2.5, data=data)
    assert "data.train: text, NOT usable here: data source 'missing-*' matches no file" in " ".join(
        text.split()
    )
    assert "steps: 2.5 epochs; how many steps that is only the tokenised data tells" in text
    assert "drawn as if it had 1,000 steps" in text
    assert "a rank of 4: 1 x 2 sequences" in text


def test_rotating_exits_are_drawn_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    rotating = {"kind": "layerskip", "early_exit": {"curriculum": "rotational", "every": 2}}
    text = shown(capsys, max_steps=500, objective=rotating)
    assert "exit weight, by layer, first steps" in text
    assert "layer dropout: none" in text
    gradual = {"kind": "layerskip", "early_exit": {"curriculum": "gradual"}}
    text = shown(capsys, max_steps=500, objective=gradual)
    assert "first steps" not in text


def test_adapters_of_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some words"], 300)
    tokenizer.save_pretrained(tmp_path)
    tiny_model(vocab_size=len(tokenizer)).config.save_pretrained(tmp_path)  # and no weights
    model = {"name_or_path": str(tmp_path), "dtype": "bfloat16", "lora": {"rank": 2, "targets": ["q_proj"]}}
    text = shown(capsys, model=model)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["trained"][1] == f"{4 * 2 * (32 + 32)}"
    assert "rank: 2" in text


def test_a_model_that_cannot_be_reached_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
    with pytest.raises(UserError) as caught:
        shown(capsys, model={"name_or_path": "nobody/nothing"})
    assert str(caught.value).startswith("model.name_or_path: 'nobody/nothing' cannot be loaded")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("optimizer", "shards"), [("adamw", True), ("muon", False)])
def test_engines_that_the_optimizer_is_not_for_are_left_out(
    capsys: pytest.CaptureFixture[str], optimizer: str, shards: bool
) -> None:
    rates = {"lr": 0.01} | ({"adamw_lr": 0.001} if optimizer == "muon" else {})
    text = shown(capsys, optimizer={"kind": optimizer} | rates)
    assert "one process" in text
    assert ("offload" in text) == shards
