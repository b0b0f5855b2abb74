"""`python -m eval` as a user has it: what it prints, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.command_line import output_directory
from eval.results import Report
from layerskip_model.errors import UserError
from tests.eval.conftest import Answer

PROMPT = "def anna_1(value):\n"


@pytest.fixture(scope="module")
def commands(
    finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, subprocess.CompletedProcess[str]]:
    """The real commands, each in a process of its own, all at once."""
    out = tmp_path_factory.mktemp("out")
    model, run = str(finished_run / "export"), str(finished_run)
    python = [sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    generate = ["eval", "generate", "--max_steps", "8", "--dtype", "float64"]
    own = ["--generation-strategy", "self_speculative", "--exit-layer", "2", "--num-speculations", "3"]
    benchmark = ["eval", "benchmark", "--num_samples", "3", "--max_steps", "8", "--num_speculations", "3"]
    started = {
        "one": [*python, *generate, "--run", run, *own, "--prompt", PROMPT],
        "closed": [*python, *generate, "--run", run, *own, "--prompt", PROMPT],
        "typed": [*python, *generate, "--model", model, "--generation_strategy", "greedy"],
        "torchrun": [*torchrun, "-m", *generate, "--model", model, "--prompt", PROMPT],
        "benchmark": [
            *python,
            *benchmark,
            "--run",
            run,
            "--exit_layer",
            "2",
            "--output_dir",
            str(out / "report"),
        ],
        "wrong": [*python, *benchmark, "--run", run, "--exit_layer", "4", "--output_dir", str(out / "never")],
    }
    pipe = subprocess.PIPE
    reader, closed = os.pipe()
    os.close(reader)
    processes = {
        name: subprocess.Popen(
            command, stdin=pipe, stdout=closed if name == "closed" else pipe, stderr=pipe, text=True
        )
        for name, command in started.items()
    }
    os.close(closed)
    done = {}
    for name, process in processes.items():
        stdout, stderr = process.communicate(f"{PROMPT.strip()}\n\ndef bert" if name == "typed" else "")
        done[name] = subprocess.CompletedProcess(started[name], process.returncode, stdout, stderr)
    done["out"] = subprocess.CompletedProcess([str(out)], 0)
    return done


def test_generate_prints_the_text_and_what_it_cost(
    commands: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    done = commands["one"]
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT)
    cost = (
        r"\[8 tokens, [\d.]+ tokens/s, acceptance rate [\d.]+, acceptance length [\d.]+, ended by length\]\n"
    )
    assert re.fullmatch(cost, done.stderr)


def test_a_reader_that_has_gone_is_no_crash(commands: dict[str, subprocess.CompletedProcess[str]]) -> None:
    done = commands["closed"]
    assert (done.returncode, done.stderr) == (1, "")


def test_prompts_are_read_line_by_line(commands: dict[str, subprocess.CompletedProcess[str]]) -> None:
    done = commands["typed"]
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT.strip())
    assert "\ndef bert" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert lines[1] == "error: prompt '': is empty; give some text to continue"
    assert lines[0].startswith("[8 tokens")
    assert lines[2].startswith("[8 tokens")


def test_under_torchrun_one_process_answers(commands: dict[str, subprocess.CompletedProcess[str]]) -> None:
    done = commands["torchrun"]
    assert done.returncode == 0, done.stderr
    assert done.stdout == commands["one"].stdout  # self-speculation is lossless
    assert done.stderr.count("tokens/s") == 1


def test_benchmark_prints_a_table_and_nothing_else(
    commands: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    done = commands["benchmark"]
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""  # no warnings, no bars that stay
    place = Path(commands["out"].args[0]) / "report"
    assert sorted(path.name for path in place.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
        "table.txt",
    ]
    report = Report.model_validate_json((place / "report.json").read_text())
    assert len(report.strategies) == 6
    assert all(strategy.equal == strategy.compared == 3 for strategy in report.strategies[1:])
    assert "python -m eval benchmark --num_samples 3" in report.environment.command
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    assert printed[:-1] == (place / "table.txt").read_text().splitlines()
    assert printed[-1] == f"report: {place / 'report.html'}"


def test_a_mistake_is_one_line_and_leaves_nothing(
    commands: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    done = commands["wrong"]
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: self_speculative: exit_layer=4 is not valid; give a whole number from 1 to 3\n"
    )
    assert not (Path(commands["out"].args[0]) / "never").exists()


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['eval', '--help']\n"
        "try: runpy.run_module('eval', run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "False\n")
    for command in ("generate", "benchmark", "correctness", "exits"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--modl", "x"], "No such option: --modl"),
        (["generate", "--max_steps", "many"], "--max_steps"),
        (["generate", "--prompt"], "requires an argument"),
        (["generat"], "No such command 'generat'"),
        (["generate", "x"], "unexpected extra argument"),
        ([], "Missing command"),
    ],
)
def test_wrong_flags_are_two_plain_lines(
    answer: Callable[..., Answer], arguments: list[str], message: str
) -> None:
    status, out, err = answer(*arguments)
    first, second, *rest = err.splitlines()
    assert (status, out, rest) == (2, "", [])
    assert first.startswith("error: ")
    assert message in first
    assert re.fullmatch("see: python -m eval (generate )?--help", second)


GENERATE = ["generate", "--model", "{model}", "--prompt", "def"]
BENCHMARK = ["benchmark", "--model", "{model}", "--dataset", "{good}", "--output_dir", "{out}"]
CORRECTNESS = ["correctness", "--model", "{model}", "--dataset", "{good}", "--output_dir", "{out}"]
SELF = ["--generation_strategy", "self_speculative"]
SPECULATIVE = ["--generation_strategy", "speculative_sampling"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GENERATE, "--generation_strategy", "self_speculativ"], "did you mean 'self_speculative'?"),
        ([*GENERATE, "--generation_strategy", "gredy"], "did you mean 'greedy'?"),
        ([*GENERATE, "--exit_layer", "0"], "exit_layer=0 is not valid; give a whole number from 1 to 4"),
        ([*GENERATE, "--exit_layer=-1"], "exit_layer=-1 is not valid"),
        ([*GENERATE, "--exit_layer", "5"], "exit_layer=5 is not valid"),
        ([*GENERATE, *SELF, "--exit_layer", "4", "--num_speculations", "2"], "exit_layer=4 is not valid"),
        (
            [*GENERATE, *SELF, "--exit_layer", "2", "--num_speculations", "0"],
            "num_speculations=0 is not valid",
        ),
        ([*GENERATE, "--num_speculations", "3"], "autoregressive has no setting 'num_speculations'"),
        ([*GENERATE, "--max_ngram", "2"], "autoregressive has no setting 'max_ngram'"),
        ([*GENERATE, *SPECULATIVE], "speculative_sampling needs draft: the directory or hub name"),
        ([*GENERATE, *SPECULATIVE, "--draft", "{tmp}/none"], "--draft: model '"),
        ([*GENERATE, "--acceptance", "typical"], "--acceptance typical is for sampling"),
        ([*CORRECTNESS, "--strategies", "hf_generate"], "'hf_generate': is transformers' own"),
        ([*CORRECTNESS, "--strategies", "lookahead:widow=2"], "did you mean 'window'?"),
        ([*CORRECTNESS, "--strategies", "lookahead", "--draft_tree"], "--draft_tree True: none of the"),
        ([*CORRECTNESS, "--acceptance", "typical"], "--acceptance typical is not lossless"),
        ([*CORRECTNESS, "--batch_size", "3"], "--batch_size 3: there are only 2 prompts"),
        ([*CORRECTNESS, "--distribution", "--draws", "9"], "--draws 9: give 1000 or more"),
        ([*GENERATE, "--sample", "maybe"], "'maybe' is neither True nor False"),
        ([*GENERATE, "--temperature", "0.5"], "--temperature 0.5 is for sampling: add --sample True"),
        ([*GENERATE, "--sample", "false", "--top_k", "5"], "--top_k 5 is for sampling: add --sample True"),
        ([*GENERATE, "--sample", "True", "--temperature", "0"], "--temperature 0.0 is not valid"),
        ([*GENERATE, "--sample", "TRUE", "--top-p", "1.5"], "--top_p 1.5 is not valid"),
        ([*GENERATE, "--sample", "true", "--seed", "-1"], "--seed -1 is not valid"),
        ([*GENERATE, "--prompt", ""], "--prompt '': is empty"),
        ([*GENERATE, "--prompt", "zq" * 200], "the model's context is 128"),
        ([*GENERATE, "--max_steps", "0"], "(--max_steps) 0: give 1 or more"),
        ([*GENERATE, "--stop", ""], "stop string '' would end"),
        ([*GENERATE, "--dtype", "float31"], "--dtype 'float31' is not one of float64, float32"),
        ([*GENERATE, "--device", "tpu9"], "--device 'tpu9' cannot be used here"),
        ([*GENERATE, "--attn_implementation", "flash"], "--attn_implementation 'flash' is not one of sdpa"),
        (["generate", "--model", "{model}", "--prompt", ""], "--prompt '': is empty"),
        (["generate", "--model", "{model}", "--prompt", "zq" * 200], "the model's context is 128"),
        (["generate", "--model", "{model}", "--prompt", "\udcff"], "is not valid UTF-8"),
        (["generate", "--prompt", "x"], "give exactly one of --model"),
        (
            ["generate", "--model", "{model}", "--run", "{run}", "--prompt", "x"],
            "give exactly one of --model",
        ),
        (["generate", "--model", "{tmp}/none", "--prompt", "x"], "no such directory"),
        (["generate", "--model", "{tmp}", "--prompt", "x"], "no config.json"),
        (["generate", "--model", "{good}", "--prompt", "x"], "is a file"),
        (["generate", "--run", "{model}", "--prompt", "x"], "no finished training run: it has no run.json"),
        (["generate", "--run", "{good}", "--prompt", "x"], "no finished training run: it has no run.json"),
        ([*BENCHMARK, "--strategies", "autoregresive"], "did you mean 'autoregressive'?"),
        ([*BENCHMARK, "--strategies", ","], "--strategies: is empty"),
        ([*BENCHMARK, "--max_steps", "0"], "--max_steps 0: give 1 or more"),
        ([*BENCHMARK, "--num_samples", "0"], "--num_samples 0: give 1 or more"),
        ([*BENCHMARK, "--num_samples", "9", "--strategies", "greedy"], "has only 2 prompts"),
        ([*BENCHMARK, "--batch_size", "0"], "--batch_size 0: give 1 or more"),
        (
            [*BENCHMARK, "--batch_size", "3", "--strategies", "greedy"],
            "--batch_size 3: there are only 2 prompts",
        ),
        ([*BENCHMARK, "--sample", "maybe"], "'maybe' is neither True nor False"),
        ([*BENCHMARK, "--sample", "false", "--top-k", "4"], "--top_k 4 is for sampling"),
        ([*BENCHMARK, "--temperature", "0"], "--temperature 0.0 is not valid"),
        ([*BENCHMARK, "--top_p", "0"], "--top_p 0.0 is not valid"),
        ([*BENCHMARK, "--top_k", "-1"], "--top_k -1 is not valid"),
        ([*BENCHMARK, "--seed", "-1"], "--seed -1 is not valid"),
        ([*BENCHMARK, "--dataset", "{bad}", "--strategies", "greedy"], "bad.jsonl:2: not JSON"),
        ([*BENCHMARK, "--dataset", "{tmp}/none.jsonl", "--strategies", "greedy"], "cannot be read"),
        ([*BENCHMARK[:-1], "{good}/sub"], "cannot be written to"),
        ([*BENCHMARK[:-1], "{good}"], "cannot be written to"),
        (["exits", "--run", "{run}", "--context_length", "129", "--output_dir", "{out}"], "allows 1 to 128"),
        (["exits", "--model", "{model}", "--dataset", "{bad}", "--output_dir", "{out}"], "bad.jsonl:2"),
    ],
)
def test_bad_input_is_one_line(
    answer: Callable[..., Answer], finished_run: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"prompt": "def anna"}\n{"turns": ["def bert"]}\n')
    bad.write_text('{"prompt": "def anna", "response": "x"}\n{"prompt"\n')
    places = {"model": finished_run / "export", "run": finished_run, "out": tmp_path / "new" / "out"}
    filled = [part.format(good=good, bad=bad, tmp=tmp_path, **places) for part in arguments]
    before = sorted(path for path in tmp_path.rglob("*"))
    status, out, err = answer(*filled)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_repeated_prompts_are_json_lines_for_a_script(
    answer: Callable[..., Answer], finished_run: Path
) -> None:
    prompts = ["--prompt", PROMPT, "--prompt", "def bert"]
    model = ["--model", str(finished_run / "export"), "--max_steps", "6"]
    status, out, err = answer("generate", *model, *prompts, "--sample", "True", "--temperature", "0.8")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (status, [row["prompt"] for row in rows]) == (0, [PROMPT, "def bert"])
    assert all(row["text"] and row["finish_reason"] for row in rows)
    assert err.startswith("[2 prompts, ")
    assert "sampled with temperature 0.8, top_k 0, top_p 1.0, seed 0" in err


def test_exits_print_a_table_and_leave_a_plot(
    answer: Callable[..., Answer], finished_run: Path, tmp_path: Path
) -> None:
    model, place = str(finished_run / "export"), tmp_path / "exits"
    status, out, err = answer(
        *("exits", "--model", model, "--context_length", "64", "--output_dir", str(place)),
        *("--dataset", str(finished_run / "heldout.jsonl")),
    )
    assert (status, err.strip()) == (0, "")
    rows = [json.loads(line) for line in (place / "exits.jsonl").read_text().splitlines()]
    assert [row["layer"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert f"{row['cross_entropy']:.3f}" in out
    assert (place / "exits.png").read_bytes()[1:4] == b"PNG"


def test_a_checkpoint_without_a_tokenizer(
    answer: Callable[..., Answer], run_without: Callable[..., Path], finished_run: Path
) -> None:
    names = [p.name for p in (finished_run / "export").iterdir() if "token" in p.name or p.suffix == ".jinja"]
    model = run_without(*(f"export/{name}" for name in names)) / "export"
    status, _, err = answer("generate", "--model", str(model), "--prompt", "x")
    assert status == 2
    assert err.count("\n") == 1
    assert "has no tokenizer" in err


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"base": 3}', '"x"', "\udc80"])
def test_a_damaged_run_file(
    answer: Callable[..., Answer], run_without: Callable[..., Path], content: str
) -> None:
    run = run_without()
    (run / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    status, _, err = answer("benchmark", "--run", str(run))
    assert status == 2
    assert err.count("\n") == 1
    assert "run.json is damaged" in err


def test_an_interruption_is_quiet(
    answer: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, finished_run: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.generate.Generator.show", interrupted)
    status, out, err = answer("generate", "--model", str(finished_run / "export"), "--prompt", "x")
    assert (status, out, err.strip()) == (130, "", "")


def use(directory: Path, error: Exception, leave: str | None = None) -> None:
    """Work that fails in an output directory, perhaps after it has left a file there."""
    with output_directory(str(directory)) as place:
        assert place is not None
        assert place.is_dir()
        if leave is not None:
            (place / leave).write_text("hours of work")
        raise error


def test_the_output_directory_goes_again_only_if_it_was_made_here(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        use(tmp_path / "a" / "b", UserError())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError):
        use(tmp_path / "mine" / "new", UserError())
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]
    with pytest.raises(RuntimeError):
        use(tmp_path / "kept", RuntimeError(), leave="table")
    assert (tmp_path / "kept" / "table").is_file()
    with output_directory(None) as place:
        assert place is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to"), output_directory(str(tmp_path)):
        pass
