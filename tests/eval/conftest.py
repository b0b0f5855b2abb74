"""A finished training run of a tiny model, made once, and what tests need of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.__main__ import app
from eval.target import Target, load_target
from layerskip_model.command_line import run_app

Answer = tuple[int, str, str]

RECIPE = """
output_dir: {run}
max_steps: 24
batch: {{sequences: 8, length: 32}}
model:
  config:
    model_type: llama
    num_hidden_layers: 4
    hidden_size: 32
    intermediate_size: 48
    num_attention_heads: 4
    num_key_value_heads: 2
    max_position_embeddings: 128
  tokenizer: {{train: {{vocab_size: 300}}}}
data:
  train: [{{kind: text, files: ["{texts}/train-*.txt"]}}]
  heldout: [{{kind: text, files: ["{texts}/heldout-*.txt"]}}]
objective:
  kind: layerskip
  layer_dropout: {{p_max: 0.1, over_depth: exp, over_time: exp}}
  early_exit: {{exits: [1, 2], weights: [0.2, 0.3]}}
optimizer: {{kind: adamw, lr: 0.01}}
log: {{every: 8}}
evaluate: {{every: 12}}
"""

HEADS_RECIPE = """
output_dir: {run}
max_steps: 12
batch: {{sequences: 8, length: 32}}
model: {{name_or_path: {base}}}
data:
  train: [{{kind: text, files: ["{texts}/train-*.txt"]}}]
  heldout: [{{kind: text, files: ["{texts}/heldout-*.txt"]}}]
objective: {{kind: medusa, heads: 3}}
optimizer: {{kind: adamw, lr: 0.01}}
log: {{every: 6}}
"""


def story(number: int, lines: int) -> str:
    """Text that is easy to continue, with some characters of several bytes."""
    names = ["anna", "bert", "chloé", "dörte"]
    return "".join(
        f"def {names[(number + i) % 4]}_{i % 3}(value):\n    return value + {i % 5}\n\n" for i in range(lines)
    )


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a real, short training."""
    place = tmp_path_factory.mktemp("training")
    for name, count, lines in (("train", 6, 40), ("heldout", 3, 60)):
        for number in range(count):
            (place / f"{name}-{number}.txt").write_text(story(number, lines), encoding="utf-8")
    run = place / "run"
    trained(place / "recipe.yaml", RECIPE.format(run=run, texts=place))
    return run


def trained(path: Path, recipe: str) -> str:
    """Train a recipe by the program; what it said."""
    path.write_text(recipe)
    result = subprocess.run([sys.executable, "-m", "train", str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.fixture(scope="session")
def heads_run(finished_run: Path) -> Path:
    """The output directory of a real, short training of Medusa heads for that run's model."""
    run = finished_run.parent / "heads"
    recipe = HEADS_RECIPE.format(run=run, base=finished_run / "export", texts=finished_run.parent)
    trained(finished_run.parent / "heads.yaml", recipe)
    return run


@pytest.fixture(scope="session")
def tiny_target(finished_run: Path) -> Target:
    """The run's model in float64, where ties do not happen."""
    return load_target(run=str(finished_run), dtype="float64")


@pytest.fixture
def run_without(finished_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """`run_without(names, **texts)`: a copy of the run without some files, or with other content in them."""

    def make(*missing: str, **changed: str) -> Path:
        copy = tmp_path / "copy"
        shutil.copytree(finished_run, copy)
        for name in missing:
            path = copy / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, text in changed.items():
            (copy / name.replace("_", ".")).write_text(text)
        return copy

    return make


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run a command in this process: exit status, standard output, standard error."""

    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["eval", *arguments])
        with pytest.raises(SystemExit) as stopped:
            run_app(app, "python -m eval")
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run
