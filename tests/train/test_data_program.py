"""The whole program on conversations: what a user types, and what comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from layerskip_model.jsonl import read_rows
from tests.chats import PLAIN, talk
from tests.train.data_files import write_jsonl
from tests.train.tiny_runs import launch_two, log_lines, recipe_values, start, write_recipe


def write_run(tmp_path: Path, **data: Any) -> Path:
    """A recipe of a few steps on conversations, of which line 5 has no answer and line 7 is cut off."""
    rows: list[dict[str, Any]] = [{"m": talk("hi", f"yo {i}", "so?", "no")} for i in range(40)]
    rows[4] = {"m": talk("hi")}
    lines = write_jsonl(tmp_path / "talks.jsonl", rows).read_text().splitlines()
    lines[6] = lines[6][:20]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    (tmp_path / "chat.jinja").write_text(PLAIN)
    source = {"kind": "jsonl", "files": [str(tmp_path / "talks.jsonl")], "conversation": "m"}
    data = {"train": [source], "heldout": 0.2, "chat_template": str(tmp_path / "chat.jinja")} | data
    values = recipe_values(tmp_path / "run", "", data=data, max_steps=2)
    values["model"]["config"]["max_position_embeddings"] = 128
    return write_recipe(tmp_path / "recipe.yaml", values | {"batch": {"sequences": 4, "length": 64}})


def test_a_malformed_row_is_named_by_its_line_on_every_rank(tmp_path: Path) -> None:
    run = launch_two("train", str(write_run(tmp_path, skip_malformed=1)))
    _, told = run.communicate(timeout=120)
    assert run.returncode != 0
    passed = [
        line for line in told.splitlines() if line.startswith("passed over malformed row 1 of at most 1")
    ]
    assert len(passed) == 1
    assert "talks.jsonl:5: a conversation without an answer" in passed[0]
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert errors  # the launcher may end the other rank before it says so too
    assert all("talks.jsonl:7: not JSON" in line for line in errors)


def test_conversations_train_and_are_held_out(tmp_path: Path) -> None:
    run = start("-m", "train", str(write_run(tmp_path, skip_malformed=2)))
    _, told = run.communicate(timeout=120)
    assert run.returncode == 0, told
    assert told.count("passed over malformed row") == 2
    assert any("loss" in line for line in log_lines(tmp_path / "run"))
    exported = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    assert exported.chat_template == PLAIN  # what it was trained with
    finished = json.loads((tmp_path / "run" / "run.json").read_text())
    for _, row in read_rows(tmp_path / "run" / finished["heldout"]):
        assert row["response"] == "no"
        assert row["prompt"].endswith("USER: so? ASSISTANT:")
        assert row["special_tokens"] is False
