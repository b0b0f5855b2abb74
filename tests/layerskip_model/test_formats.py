"""`python -m layerskip_model.formats` as a user has it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip_model.command_line import new_directory
from layerskip_model.errors import UserError
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("formats") / "model"
    tiny_model().save_pretrained(directory)
    return str(directory)


def formats(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "layerskip_model.formats", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_export(model: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "draft"
    done = formats("export", "--to", "draft_model", "--exit-layer", "3", model, str(out))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-2:]  # DeepSpeed, where it is installed, speaks when it is imported
    assert lines[0].startswith(f"{out}: the first 3 of 4 layers of {model} with its norm and LM head, ")
    assert lines[0].endswith(" parameters in float64, 0.2 MB")
    assert lines[1].startswith(f"vLLM: vllm serve {model} --speculative-config '{{")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["draft"]


def test_a_mistake_is_one_line_and_leaves_nothing(model: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "draft"
    done = formats("export", "--to", "draft_model", "--exit_layer", "4", model, str(out))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: --exit_layer 4: the model has 4 layers")
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_there_is_not_and_help_need_no_torch(model: str, tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['formats', *sys.argv[1:]]\n"
        "try: runpy.run_module('layerskip_model.formats', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    for arguments in (
        ["export", "--help"],
        ["export", "--to", "x", "--exit_layer", "2", model, str(tmp_path)],
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.stdout.endswith("False\n")
    assert done.stderr == "error: --to 'x' is no format that can be written; give draft_model\n"


def fail_in(place: Path) -> None:
    """Work that fails when half is written."""
    with new_directory(str(place)) as partial:
        (partial / "file").write_text("half")
        raise RuntimeError


def test_a_new_directory_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError):
        fail_in(place)
    assert list(tmp_path.iterdir()) == []
    place.mkdir(parents=True)  # an empty one will do
    shutil.copytree(place, place.with_name(".b.partial"))  # of a process that was killed
    with new_directory(str(place)) as partial:
        (partial / "file").write_text("whole")
        assert list(place.iterdir()) == []
    assert [path.name for path in place.iterdir()] == ["file"]
    assert [path.name for path in place.parent.iterdir()] == ["b"]


def test_what_is_there_already_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path, part in ((tmp_path, "is not empty"), (tmp_path / "file", "cannot be written to")):
        with pytest.raises(UserError, match=part), new_directory(str(path)):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
