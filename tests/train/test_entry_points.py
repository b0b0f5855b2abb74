"""The ways into training: from Python, from the command line, through accelerate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny_runs import (
    ROOT,
    assert_close_logs,
    assert_close_weights,
    recipe_values,
    start,
    write_recipe,
    write_text,
)
from train import Recipe, load_recipe, parse_recipe, train


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def test_training_from_python_is_three_lines(text: Path, tmp_path: Path) -> None:
    values = recipe_values(tmp_path / "run", text, max_steps=1)
    code = f"from train import parse_recipe, train\nrecipe = parse_recipe({values!r})\ntrain(recipe)"
    exec(code, {})
    assert (tmp_path / "run" / "run.json").is_file()
    path = write_recipe(tmp_path / "recipe.yaml", values)
    recipe = load_recipe(path, ["max_steps=2"])
    assert isinstance(recipe, Recipe)
    assert recipe.total_steps == 2
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        import_name("trian")


def import_name(name: str) -> Any:
    import train as package

    return getattr(package, name)


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['train', '--help']\n"
        "try: runpy.run_module('train', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--fresh" in done.stdout


def test_accelerate_launch_trains(text: Path, tmp_path: Path) -> None:
    values = recipe_values(tmp_path / "other", text)
    path = write_recipe(tmp_path / "recipe.yaml", values)
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1")
    process = start(*launcher, *options, "-m", "train", str(path), f"output_dir={tmp_path / 'run'}")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert not (tmp_path / "other").exists()
    train(parse_recipe(values))
    assert_close_weights(tmp_path / "run", tmp_path / "other")
    assert_close_logs(tmp_path / "run", tmp_path / "other")
