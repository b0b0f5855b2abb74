"""The README's commands and Python, run as they stand on a tiny run and recipe."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of that language."""
    found = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
    return [text for name, text in found if name == language]


def commands(program: str) -> list[str]:
    """The README's command lines that begin so, continuation lines joined."""
    lines = "\n".join(blocks("")).replace("\\\n", " ").splitlines()
    found = [line for line in lines if line.startswith(program)]
    assert found
    return found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The quickstart's recipe, made small: a text of our own, a few steps of a tiny model."""
    place = tmp_path_factory.mktemp("readme")
    for number in range(24):  # so many that none of the two parts can be empty, wherever the folder is
        (place / f"{number}.txt").write_text("def main(value):\n    return value + 1\n\n" * 20)
    text = (ROOT / "recipes/quickstart/layerskip.yaml").read_text()
    for old, new in {
        "max_steps: 600": "max_steps: 4",
        "length: 256": "length: 32",
        "hidden_size: 192": "hidden_size: 24",
        "vocab_size: 2048": "vocab_size: 270",
        "warmup_steps: 30": "warmup_steps: 1",
        "{kind: stdlib}": f'{{kind: text, files: ["{place}/*.txt"]}}',
        "heldout: 0.05": "heldout: 0.3",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    path = place / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def workplace(recipe: str) -> Path:
    """A folder in which `layerskip`, `medusa` and `eagle` are finished runs of `runs/quickstart`."""
    place = Path(recipe).parent
    run(f"python -m train {recipe} output_dir=runs/quickstart/layerskip", place)
    data = f'{{train: [{{kind: text, files: ["{place}/*.txt"]}}], heldout: 0.3}}'
    small = f"max_steps=2 schedule.warmup_steps=0 evaluate.sequences=4 batch.length=32 'data={data}'"
    for heads in ("medusa", "eagle"):
        run(f"python -m train {ROOT}/recipes/quickstart/{heads}.yaml {small}", place)
    return place


def run(command: str, place: Path) -> str:
    """Run a command line in a folder; its standard output."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": ""}
    result = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_evaluation_commands(workplace: Path) -> None:
    export = "runs/quickstart/layerskip/export"
    (workplace / "prompts.jsonl").write_text('{"prompt": "def main("}\n{"prompt": "    return"}\n')
    for command in commands("python -m eval"):
        small = command.replace("facebook/layerskip-llama3.2-1B", export).replace("DIR_OR_HUB_NAME", export)
        small = re.sub(r"--num_samples \d+", "--num_samples 2", small)
        small = re.sub(r"--max_steps \d+", "--max_steps 6", small)
        if " tree " in small:
            small += " --num_samples 2 --max_steps 6 --max_nodes 4"
        if "draft=" in small and " benchmark " in small:
            small += " --num_samples 1 --max_steps 6"
        if " doctor " in small:
            small += " --num_samples 2"
        if " correctness " in small:
            small += " --num_samples 1 --max_steps 6"
            small = small.replace("--distribution", "--distribution --draws 1000")
        assert run(small, workplace)
    assert (workplace / "report/report.html").is_file()
    assert (workplace / "report/exits.png").is_file()


def test_the_export_for_other_engines(workplace: Path) -> None:
    draft_model, heads = commands("python -m layerskip_model.formats")
    assert "first 2 of 16 layers" in run(draft_model, workplace)
    assert (workplace / "draft/config.json").is_file()
    assert "vllm serve" in run(heads, workplace)
    assert (workplace / "heads-for-vllm/config.json").is_file()


def test_the_training_command_with_overrides(recipe: str) -> None:
    command = next(line for line in commands("accelerate launch -m train") if "=" in line)
    small = command.replace("accelerate launch", "python").replace(
        "recipes/quickstart/layerskip.yaml", recipe
    )
    run(small.replace("max_steps=300", "max_steps=2"), Path(recipe).parent)
    assert (Path(recipe).parent / "runs/mine/export/config.json").is_file()


def test_the_python(recipe: str) -> None:
    (code,) = [block for block in blocks("python") if "from train import" in block]
    small = code.replace("recipes/quickstart/layerskip.yaml", recipe).replace("runs/mine", "runs/python")
    small = small.replace("max_steps=300", "max_steps=2").replace(
        "num_samples=8", "num_samples=1, max_steps=6"
    )
    run(shlex.join(["python", "-c", small]), Path(recipe).parent)
    assert (Path(recipe).parent / "report/report.md").is_file()
