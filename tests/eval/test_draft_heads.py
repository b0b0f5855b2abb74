"""Drafting heads from the command line: what was trained is loaded and drafts; what does not fit is one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import Request, run_benchmark
from eval.decoding.published_trees import published_tree
from eval.decoding.static_tree import TreeShape
from eval.draft_heads import default_tree, drafting_strategy, fitting, load_medusa_draft, named_tree, say
from eval.drafts import with_loaded_drafts
from eval.results import Report
from eval.target import Target, load_target
from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import no_progress_bar
from tests.eval.conftest import Answer
from tests.tiny_models import tiny_model

PROMPT = ["--prompt", "def bert_1(value):\n"]
FEW = ["--num_samples", "3", "--max_steps", "12", "--dtype", "float64"]


@pytest.fixture(scope="module")
def both(finished_run: Path, heads_run: Path) -> list[str]:
    """A model and heads for it, by flags."""
    return ["--model", str(finished_run / "export"), "--draft", str(heads_run / "export")]


@pytest.fixture
def heads_with(heads_run: Path, tmp_path: Path) -> Callable[..., str]:
    """`heads_with(cut=..., tree=..., **config)`: a copy of the heads' directory with changes."""

    def make(*, cut: int = 0, tree: Any = None, **config: Any) -> str:
        copy = tmp_path / "heads"
        shutil.copytree(heads_run / "export", copy)
        told = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(told | config))
        weights = copy / "medusa_lm_head.safetensors"
        weights.write_bytes(weights.read_bytes()[: -cut or None])
        if tree is not None:
            (copy / "tree.json").write_text(json.dumps(tree))
        return str(copy)

    return make


def test_what_was_trained_generates(
    answer: Callable[..., Answer], finished_run: Path, heads_run: Path, both: list[str]
) -> None:
    """By the run, whose strategy it is then, and by the names of a model and of heads: what plain decoding says."""
    flags = ["--max_steps", "16", "--dtype", "float64", *PROMPT]
    _, plain, _ = answer("generate", "--run", str(finished_run), *flags)
    chosen = ["--generation_strategy", "medusa"]
    by_run = ["--run", str(heads_run)]
    named = ["--model", str(finished_run / "export"), "--draft", str(heads_run)]
    for how in (by_run, by_run + chosen, both + chosen, named + chosen):
        status, out, err = answer("generate", *how, *flags)
        assert (status, out) == (0, plain), err
        words = re.search(r"acceptance length ([\d.]+)", err)
        if "--generation_strategy" in how:
            assert words is not None
            assert float(words[1]) > 1.0


def test_what_was_trained_is_correct(
    answer: Callable[..., Answer], heads_run: Path, both: list[str], tmp_path: Path
) -> None:
    """By default that strategy is among those that are checked; sampled tokens are compared, too."""
    dataset = ["--dataset", str(heads_run / "heldout.jsonl")]
    for flags in (
        ["--run", str(heads_run), "--batch_size", "3"],
        [*both, *dataset, "--sample", "True", "--temperature", "0.8", "--strategies", "medusa"],
    ):
        status, out, err = answer("correctness", *flags, *FEW, "--output_dir", str(tmp_path))
        assert status == 0, err
        assert re.search(r"^medusa, .*: 3 of 3 prompts equal$", out, re.MULTILINE), out


def test_what_was_trained_is_measured(answer: Callable[..., Answer], heads_run: Path, tmp_path: Path) -> None:
    """The run's own chain and other trees beside the baseline; typical acceptance told apart."""
    tree = tmp_path / "tree.json"
    tree.write_text(json.dumps({"paths": [[0], [1], [0, 0], [0, 1]]}))
    entries = f"medusa,medusa:tree={tree},medusa:tree={tree}:tree_tokens=2"
    typical = ["--sample", "True", "--acceptance", "typical"]
    reports = []
    for extra in (["--strategies", entries], ["--strategies", "medusa", *typical]):
        flags = ["--run", str(heads_run), *FEW, *extra, "--output_dir", str(tmp_path)]
        status, out, err = answer("benchmark", *flags)
        assert status == 0, err
        assert "report: " in out
        reports.append(Report.model_validate_json((tmp_path / "report.json").read_text()))
    greedy = [one for one in reports[0].strategies if one.strategy == "medusa"]
    assert len(greedy) == 3
    for one in greedy:
        assert one.equal == one.compared == 3
        assert one.acceptance_length is not None
    (sampled,) = (one for one in reports[1].sampled if one.strategy == "medusa")
    assert not sampled.lossless
    assert "not lossless" in (tmp_path / "table.txt").read_text()


def test_tokens_are_counted_by_their_ids(heads_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline's too: their text, encoded again, could have more or fewer of them."""
    target = load_target(run=str(heads_run), dtype="float64")
    monkeypatch.setattr(type(target.tokenizer), "decode", lambda *_, **__: "one")
    report = run_benchmark(target, Request(num_samples=2, max_steps=8))
    for strategy in report.strategies:
        assert [prompt.new_tokens for prompt in strategy.prompts] == [8, 8]
        assert [prompt.text for prompt in strategy.prompts] == ["one", "one"]
        seconds = sum(prompt.seconds for prompt in strategy.prompts)
        assert strategy.tokens_per_second is not None
        assert strategy.tokens_per_second.value == pytest.approx(16 / seconds)


def test_a_tree_beside_the_heads_is_used(tiny_target: Target, heads_with: Callable[..., str]) -> None:
    place = heads_with(tree={"paths": [[0], [1], [0, 0], [0, 0, 0]]})
    assert load_medusa_draft(tiny_target, place).tree.paths == ((0,), (1,), (0, 0), (0, 0, 0))


def test_a_tree_deeper_than_the_heads_is_cut_with_a_word(
    tiny_target: Target, heads_with: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the heads or named: shallower, and no crash."""
    deep = {"paths": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0], [1], [0, 0, 0, 0, 0]]}
    draft = load_medusa_draft(tiny_target, heads_with(tree=deep))
    shallow = ((0,), (0, 0), (0, 0, 0), (1,))
    assert draft.tree.paths == shallow
    assert "has 5 levels and there are 3 heads: cut to 4 of its 6 nodes" in capsys.readouterr().err
    path = tmp_path / "deep.json"
    path.write_text(json.dumps(deep))
    settings = with_loaded_drafts(tiny_target, "medusa", {"draft": draft, "tree": str(path)})
    assert settings["tree"].paths == shallow
    assert f"tree '{path}' has 5 levels" in capsys.readouterr().err


def test_heads_come_in_the_targets_dtype_once_and_stay_as_they_are(
    tiny_target: Target, heads_run: Path
) -> None:
    settings = {"draft": str(heads_run)}
    first, again = (with_loaded_drafts(tiny_target, "medusa", settings)["draft"] for _ in range(2))
    assert first is again
    assert {parameter.dtype for parameter in first.heads.parameters()} == {torch.float64}
    assert not any(parameter.requires_grad for parameter in first.heads.parameters())
    assert (first.number, first.name) == (3, str(heads_run))
    assert (first.tree.name, first.tree.paths) == ("chain", TreeShape.chain(3).paths)


def test_a_name_tells_its_strategy(heads_run: Path, finished_run: Path) -> None:
    for name, strategy in (
        (heads_run, "medusa"),
        (heads_run / "export", "medusa"),
        (finished_run / "export", "speculative_sampling"),
    ):
        assert drafting_strategy(str(name)) == strategy
    with pytest.raises(UserError, match="that run trained no heads"):
        drafting_strategy(str(finished_run))


BAD: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no draft": ({}, [], "medusa needs draft: a directory of Medusa heads, or the run that trained them"),
    "nothing there": ({}, ["--draft", "{tmp}/none"], "no config.json in it"),
    "a model for heads": ({}, ["--draft", "{model}"], "these are no Medusa heads"),
    "a run without heads": ({}, ["--draft", "{run}"], "that run trained no heads; name one that did"),
    "cut short": ({"cut": 100}, ["--draft", "{heads}"], "is cut short or damaged"),
    "zero heads": ({"medusa_num_heads": 0}, ["--draft", "{heads}"], "medusa_num_heads is 0 in config.json"),
    "more heads in the config": ({"medusa_num_heads": 4}, ["--draft", "{heads}"], "lacks '3.0.linear.bias'"),
    "other weights": ({"base_fingerprint": "0" * 64}, ["--draft", "{heads}"], "its fingerprint differs"),
    "a foreign tree beside them": (
        {"tree": {"paths": [[0], [0, 1, 2]]}},
        ["--draft", "{heads}"],
        "has no parent",
    ),
    "no such tree": ({}, ["--draft", "{heads}", "--tree", "{tmp}/oak"], "oak'"),
    "a tree of one negative rank": (
        {"tree": {"paths": [[0], [-1]]}},
        ["--draft", "{heads}"],
        "[-1] is no path; give ranks, whole numbers of 0 or more",
    ),
    "a rank beyond the vocabulary": (
        {"tree": {"paths": [[0], [9999]]}},
        ["--draft", "{heads}"],
        "has rank 9999 and the model's vocabulary 300 tokens; give ranks below that",
    ),
    "more levels than heads": (
        {},
        ["--draft", "{heads}", "--tree", "chain", "--num_speculations", "4"],
        "num_speculations=4 is more than the 3 levels of tree 'chain'",
    ),
    "no levels": (
        {},
        ["--draft", "{heads}", "--tree", "chain", "--num_speculations", "0"],
        "num_speculations=0 is not valid",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", ["generate", "benchmark", "correctness"])
def test_bad_heads_and_trees_are_one_line(
    answer: Callable[..., Answer],
    heads_with: Callable[..., str],
    finished_run: Path,
    tmp_path: Path,
    command: str,
    case: str,
) -> None:
    changes, flags, message = BAD[case]
    places = {"tmp": tmp_path, "model": finished_run / "export", "run": finished_run}
    heads = heads_with(**changes)
    filled = [flag.format(heads=heads, **places) for flag in flags]
    before = sorted(tmp_path.rglob("*"))
    status, out, err = answer(command, "--model", str(places["model"]), *strategy(command, "medusa"), *filled)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def strategy(command: str, name: str) -> list[str]:
    """The flags that ask for a strategy."""
    if command == "generate":
        return ["--generation_strategy", name, *PROMPT]
    return ["--strategies", name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 40}, "are of another model: "),
        ({"hidden_size": 16, "head_dim": 4}, "are of another model: "),
        ({"intermediate_size": 40}, "with other weights than"),
    ],
)
def test_heads_of_another_backbone_are_one_line(
    answer: Callable[..., Answer],
    heads_run: Path,
    finished_run: Path,
    tmp_path: Path,
    changes: dict[str, int],
    message: str,
) -> None:
    """Of another vocabulary, another size, or the same sizes and other weights."""
    own = load_target(run=str(finished_run))
    sizes: dict[str, Any] = {"vocab_size": own.runner.backbone.vocab_size, **changes}
    with no_progress_bar():
        tiny_model(dtype=torch.float32, **sizes).save_pretrained(tmp_path)
    own.tokenizer.save_pretrained(tmp_path)
    status, _, err = answer(
        "generate", "--model", str(tmp_path), "--draft", str(heads_run), *strategy("generate", "medusa")
    )
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith("error: heads '")
    assert message in err


def test_heads_are_no_draft_model(answer: Callable[..., Answer], both: list[str]) -> None:
    """And are told from one."""
    flags = ["--num_speculations", "2", *strategy("generate", "speculative_sampling")]
    status, _, err = answer("generate", *both, *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: --draft")
    assert "heads" in err


def test_the_default_tree_depends_on_the_device() -> None:
    assert default_tree(3, torch.device("cpu")).is_chain
    on_gpu = default_tree(3, torch.device("cuda"))
    assert (on_gpu.size, on_gpu.depth) == (61, 3)


def test_trees_by_name_are_cut_to_the_heads_which_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    say.cache_clear()
    assert named_tree("medusa_vicuna_7b_stage1", 4).paths == published_tree("medusa_vicuna_7b_stage1").paths
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert named_tree("eagle_mc_sim_7b_63", 2).size == 12
    said = "tree 'eagle_mc_sim_7b_63' has 5 levels and there are 2 heads: cut to 12 of its 25 nodes\n"
    assert capsys.readouterr().err == said
    assert fitting(TreeShape.chain(3), 3) == TreeShape.chain(3)
