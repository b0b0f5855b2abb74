"""python -m scripts.regenerate as a program: alone, killed, on two processes, and read by a recipe."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import load_tokenizer
from scripts.regenerate import app
from tests.chats import talk
from tests.train.data_files import write_jsonl
from train.data.encoding import encoder_for
from train.data.sources import DataConfig

SHAREGPT = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "old"}]
ROOT = Path(__file__).parents[2]
MODULE = ["-m", "scripts.regenerate"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *MODULE]


def start(*arguments: object, launcher: list[str] = MODULE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, error = process.communicate(timeout=600)
    return process.returncode, output, error


@pytest.fixture(scope="module")
def flags(finished_run: Path) -> list[object]:
    """Continues pieces of the training files, drawn, in float64, where batches change nothing."""
    recipe = finished_run / "recipe.yaml"
    assert len(yaml.safe_load(recipe.read_text())["data"]["train"]) == 1
    sampling = ["--sample", "True", "--temperature", "0.8", "--seed", "5"]
    steps = ["--max_steps", "20", "--batch_size", "2", "--num_samples", "6"]
    return ["--model", finished_run / "export", "--dataset", recipe, "--dtype", "float64", *steps, *sampling]


@pytest.fixture(scope="module")
def alone(flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("answers") / "alone"
    run(*flags, "--output_dir", place)
    return place


def rows_of(place: Path) -> bytes:
    assert sorted(path.name for path in place.iterdir()) == ["manifest.json", "rows.jsonl"]
    return (place / "rows.jsonl").read_bytes()


def test_the_recipe_line_that_it_prints_learns_from_its_rows(alone: Path, finished_run: Path) -> None:
    source = {"kind": "jsonl", "files": [f"{alone}/rows.jsonl"]}
    pair = {"pair": {"prompt": "prompt", "response": "response"}}
    config = DataConfig.model_validate({"train": [source | pair]})
    tokenizer = load_tokenizer(str(finished_run / "export"))
    encoded = list(encoder_for(config.train[0], tokenizer, config)(config.train[0].documents()))
    rows = [json.loads(line) for line in rows_of(alone).splitlines()]
    assert len(encoded) == len(rows) == 6
    for row, found in zip(rows, encoded, strict=True):
        assert row["document"].startswith(str(finished_run.parent)), "a training file"
        assert (found.ids[-1] == tokenizer.eos_token_id) == (row["finish_reason"] == "eos")
    manifest = json.loads((alone / "manifest.json").read_text())
    assert manifest["counts"]["answers_ended_by"]["length"] > 0
    assert manifest["job"]["choosing"]["temperature"] == 0.8
    assert str(finished_run / "export") == manifest["model"]


def test_two_processes_write_what_one_writes(alone: Path, flags: list[object], tmp_path: Path) -> None:
    status, output, error = finish(start(*flags, "--output_dir", tmp_path / "two", launcher=TORCHRUN))
    assert status == 0, error
    assert output.startswith(f"{tmp_path}/two/rows.jsonl: 6 rows of 6, ")
    assert output.count("\n") == 2
    assert "process 1 of 2: " in error
    assert rows_of(tmp_path / "two") == rows_of(alone)
    assert "scripts.regenerate" in json.loads((tmp_path / "two" / "manifest.json").read_text())["command"]


def test_killed_it_goes_on_and_complete_it_stays(alone: Path, flags: list[object], tmp_path: Path) -> None:
    place = tmp_path / "killed"
    process = start(*flags, "--output_dir", place)
    part = place / "parts" / "part-0.jsonl"
    while process.poll() is None and not part.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert not (place / "rows.jsonl").exists()
    done = part.read_bytes().count(b"\n")
    status, _, error = finish(start(*flags, "--output_dir", place))
    assert status == 0, error
    assert f"of {6 - 2 * done} rows" in error
    assert rows_of(place) == rows_of(alone)
    before = contents(place)
    run(*flags, "--output_dir", place)
    assert contents(place) == before


def contents(place: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in place.iterdir()}


def run(*arguments: object) -> None:
    """In this process; mistakes raise."""
    app([*map(str, arguments)], prog_name="regenerate", standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["MODEL", "TALKS"],
            "has no chat template, which conversations need; name a Jinja file in --chat_template",
        ),
        (["MODEL", "TALKS", "--chat_template", "no.jinja"], "--chat_template='no.jinja' cannot be read"),
        (
            ["MODEL", "TEXTS", "--chat_template", "no.jinja"],
            "texts.jsonl' has no conversations; leave it out",
        ),
        (["MODEL", "TEXTS", "--num_samples", "2"], "--num_samples 2: the dataset has only 1 prompts"),
        (["MODEL", "TEXTS", "--num_samples", "0"], "--num_samples 0"),
        (["MODEL", "TEXTS", "--generation_strategy", "greddy"], "unknown strategy 'greddy'"),
        (["MODEL", "--dataset=no.jsonl"], "no.jsonl: cannot be read"),
        (["MODEL", "TEXTS", "--command=cat"], r"--model \S+ with --command 'cat'"),
        (["TEXTS", "--command=cat", "--sample=True"], "--sample True with --command 'cat'"),
        (["TEXTS", "--command=cat"], "--command 'cat', answer 1 has keys"),
        (["TEXTS"], "give exactly one of --model"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str, finished_run: Path, tmp_path: Path) -> None:
    talks = write_jsonl(tmp_path / "talks.jsonl", [{"messages": talk("one", "two")}])
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"prompt": "one"}])
    names = {
        "MODEL": f"--model={finished_run / 'export'}",
        "TALKS": f"--dataset={talks}",
        "TEXTS": f"--dataset={texts}",
    }
    place = tmp_path / "made" / "place"
    with pytest.raises(UserError, match=message):
        run(*(names.get(argument, argument) for argument in arguments), "--output_dir", place)
    assert [path.name for path in tmp_path.rglob("made/**/*") if path.is_file()] in ([], ["job.json"])


def test_conversations_are_answered_through_a_template_of_the_users(
    finished_run: Path, tmp_path: Path
) -> None:
    talks = write_jsonl(
        tmp_path / "talks.jsonl", [{"conversations": SHAREGPT}, {"conversations": SHAREGPT[:1]}]
    )
    template = ROOT / "recipes" / "chat_templates" / "vicuna.jinja"
    place = tmp_path / "place"
    flags = [
        "--model",
        finished_run / "export",
        "--dataset",
        talks,
        "--chat_template",
        template,
        "--output_dir",
        place,
    ]
    with pytest.raises(UserError, match="no row can be learnt from: 2 of 2 rows: the first answer was cut"):
        run(*flags, "--max_steps", 1)
    text = 'print(\'{"text": "new", "finish_reason": "stop"}\\n\' * 2)'
    run("--dataset", talks, "--output_dir", place, "--command", shlex.join([sys.executable, "-c", text]))
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    assert rows == [{"messages": talk("one", "new"), "document": f"talks.jsonl:{n}"} for n in (1, 2)]


class Server(BaseHTTPRequestHandler):
    """Answers as OpenAI's interface does, with what it was asked."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, asked["model"], asked["max_tokens"]) == ("/v1/chat/completions", "mine", 9)
        answer = {"message": {"content": f"{len(asked['messages'])} é"}, "finish_reason": "stop"}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [answer]}).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_the_command_in_the_documentation_asks_a_server(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "regenerated-data.md").read_text()
    script = tmp_path / "ask.py"
    script.write_text(page.split("```python\n")[1].split("```")[0])
    talks = write_jsonl(tmp_path / "talks.jsonl", [{"messages": talk(*["a"] * n)} for n in (3, 1)])
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        command = shlex.join([sys.executable, str(script), f"http://127.0.0.1:{server.server_port}", "mine"])
        flags = ["--dataset", talks, "--max_steps", 9, "--output_dir", tmp_path / "place"]
        run("--command", command, *flags)
        server.shutdown()
    rows = [
        json.loads(line)["messages"] for line in (tmp_path / "place" / "rows.jsonl").read_text().splitlines()
    ]
    assert rows == [talk("a", "1 é", "a", "3 é"), talk("a", "1 é")]


def test_its_own_error_is_one_line_and_its_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    status, output, error = finish(start("--dataset", "no.jsonl", "--output_dir", tmp_path))
    assert (status, output) == (2, "")
    assert error.startswith("error: no.jsonl: cannot be read")
    assert error.count("\n") == 1
    code = (
        "import sys\nfrom scripts.regenerate import app\napp(['--help'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    assert finish(start(code, launcher=["-c"]))[0] == 0
