"""Runs over streams: what they need, and that one goes on when its source was lost."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from layerskip_model.errors import UserError
from layerskip_model.jsonl import write_rows
from tests.train.tiny_runs import exported, launch_two, log_lines, recipe_values, start, write_recipe
from train.config import parse_recipe
from train.data.prepare import prepare
from train.data.tokenizer import TokenizerConfig, train_tokenizer
from train.loop import train
from train.processes import join

TRAIN_280 = TokenizerConfig.model_validate({"train": {"vocab_size": 280}})
TEXTS = [f"def f{i}():\n    return {i}\n" * 3 for i in range(12)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for i, text in enumerate(TEXTS):
        Path(f"{i:02}.txt").write_text(text)
    return tmp_path


def streamed_recipe(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A stream beside text on disk, by weight."""
    values = recipe_values(folder / name, folder, max_steps=6, **changes)
    train_tokenizer(TEXTS, 280).save_pretrained(folder / "mine")
    write_rows(folder / "stream.jsonl", [{"text": text} for text in TEXTS * 2])
    values["model"]["tokenizer"] = {"name_or_path": str(folder / "mine")}
    values["data"] = {
        "train": [
            {"kind": "jsonl", "files": [f"{folder}/stream.jsonl"], "streaming": True, "weight": 2},
            {"kind": "text", "files": [f"{folder}/0*.txt"], "weight": 1},
        ],
        "heldout": [{"kind": "text", "files": [f"{folder}/1*.txt"]}],
        "shuffle_buffer": 8,
    }
    return values


def test_a_stream_needs_a_length_and_a_tokenizer(folder: Path) -> None:
    values = streamed_recipe(folder, "run")
    with pytest.raises(UserError, match="epochs: 1 with a streaming source"):
        parse_recipe(values | {"max_steps": None, "epochs": 1})
    recipe, named = parse_recipe(values), TokenizerConfig(name_or_path="mine")
    with pytest.raises(UserError, match=r"model\.tokenizer\.train reads every training document"):
        prepare(recipe.data, TRAIN_280, folder / "data", join(), length=16)
    prepared = prepare(recipe.data, named, folder / "data", join(), length=16)
    assert prepared.is_streamed
    assert prepared.amount == "a stream of tokens"

    class Wrapped:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
            return {}

    with pytest.raises(UserError, match="set streaming: false"):
        prepared.batches(Wrapped(), sequences=8, micro=8, seed=0, start=0, stop=1)


def test_a_run_over_a_stream_that_is_lost_goes_on_as_if_nothing_had_been(folder: Path) -> None:
    """The whole program: on one process until the source is lost, then on two; and never stopped."""
    recipe = write_recipe(folder / "lost.yaml", streamed_recipe(folder, "lost"))
    first = start("-m", "tests.train.lost_stream_run", str(recipe), "20")
    _, said = first.communicate(timeout=180)
    assert first.returncode == 2, said
    assert "Traceback" not in said
    lost = [line for line in said.splitlines() if line.startswith("error: ")]
    assert lost, said
    assert all("stream.jsonl" in line and "cannot be read after 20 rows (3 attempts" in line for line in lost)
    again = launch_two("train", str(recipe))
    _, errors = again.communicate(timeout=180)
    assert again.returncode == 0, errors
    assert "going on after step" in errors
    train(parse_recipe(streamed_recipe(folder, "whole")))
    ours, theirs = exported(folder / "whole"), exported(folder / "lost")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0.0, atol=2e-5)
    assert [row["step"] for row in log_lines(folder / "lost")] == [
        row["step"] for row in log_lines(folder / "whole")
    ]


def test_a_run_that_waits_for_its_source_stops_when_asked(folder: Path) -> None:
    """SIGTERM in a pause between two attempts: the steps are saved, and nothing waits for the pause's end."""
    recipe = write_recipe(folder / "away.yaml", streamed_recipe(folder, "away"))
    run = start("-m", "tests.train.lost_stream_run", str(recipe), "20", "1000")
    assert run.stderr is not None
    told = ""
    while "trying again in 1000 s" not in told:
        line = run.stderr.readline()
        assert line, told
        told += line
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, told + said
    assert "run the same command to go on" in said
