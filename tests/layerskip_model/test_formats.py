"""`python -m layerskip_model.formats` as a user has it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip_model.command_line import new_directory
from layerskip_model.errors import UserError
from layerskip_model.formats.__main__ import app
from tests.layerskip_model.test_medusa_format import saved, some_heads, write
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
        ["import", "--help"],
        ["export", "--to", "x", "--exit_layer", "2", model, str(tmp_path)],
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.stdout.endswith("False\n")
    known = "draft_model, eagle, medusa, sglang, speculators, tgi, vllm"
    assert done.stderr == f"error: --to 'x' is no format that can be written; give one of {known}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--to", "draft_model"], "--to draft_model needs --exit_layer E"),
        (
            ["--to", "draft_model", "--exit_layer", "2", "--dtype", "float16"],
            "--dtype 'float16': a draft model keeps",
        ),
        (
            ["--to", "vllm", "--exit_layer", "2"],
            "--exit_layer 2 is for --to draft_model; heads for --to vllm have none",
        ),
    ],
)
def test_a_flag_of_another_form_is_refused(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        app(["export", *arguments, "heads", str(tmp_path)], standalone_mode=False)
    assert str(caught.value).startswith(expected)
    assert list(tmp_path.iterdir()) == []


def test_heads_there_and_back(tmp_path: Path) -> None:
    """As a user has it, from a run's folder; and what is wrong is one line that leaves nothing."""
    base = saved(tmp_path / "base")
    heads = write(tmp_path / "run" / "export", base, some_heads(base, shared=True))
    handoff = {"base": str(tmp_path / "base"), "heads": "export", "heldout": "h", "recipe": "r"}
    suggested = {"strategy": "medusa", "settings": {}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(handoff | {"suggested": suggested}))
    run, theirs, ours = (str(tmp_path / name) for name in ("run", "theirs", "ours"))
    done = formats("export", "--to", "tgi", run, theirs)
    assert done.returncode == 0, done.stderr
    words = "their shared projection stored 3 times, as this form has one a head"
    lines = done.stdout.splitlines()[-2:]
    assert (
        lines[0]
        == f"{theirs}: 3 Medusa heads of 2 blocks in float32, 0.1 MB, {words}, for {base.name_or_path}"
    )
    assert lines[1] == f"TGI: text-generation-launcher --model-id {theirs} --speculate 3"
    done = formats("import", "--model", str(base.name_or_path), theirs, ours)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ours" / "config.json").read_bytes() == (heads / "config.json").read_bytes()
    done = formats("import", "--model", str(base.name_or_path), theirs, ours)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.splitlines()[-1] == f"error: '{ours}' is not empty; name a new directory, or an empty one"
    )


def test_what_vllm_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(tmp_path / "base")
    heads = write(tmp_path / "heads", base, some_heads(base))
    out = str(tmp_path / "out")
    app(["export", "--to", "vllm", "--dtype", "bfloat16", str(heads), out], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{out}: 3 Medusa heads of 2 blocks in bfloat16, ")
    speculation = {"method": "medusa", "model": out, "num_speculative_tokens": 3}
    assert (
        lines[1] == f"vLLM: vllm serve {base.name_or_path} --speculative-config '{json.dumps(speculation)}'"
    )


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
