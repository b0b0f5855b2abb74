"""`python -m eval tree`: which tree is chosen, the file that it leaves, what uses it, and one line for mistakes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval import tree_race, tree_search
from eval.choosing import Choosing
from eval.decoding.acceptance import Greedy
from eval.decoding.drafters.eagle2 import Eagle2
from eval.decoding.drafters.medusa import Medusa, MedusaDraft
from eval.decoding.growing import Shape
from eval.decoding.published_trees import published_tree
from eval.decoding.speculate import Generation
from eval.decoding.static_tree import TreeShape, read_tree
from eval.decoding.strategies import make_drafter
from eval.draft_heads import (
    EAGLE_TREE,
    default_tree,
    growth_settings,
    load_eagle_draft,
    saved_growth,
    say,
    say_default,
)
from eval.drafts import loaded
from eval.generate import Generator
from eval.prompts import encode_prompts, evenly_spaced
from eval.target import Target, load_target
from eval.tree_costs import AnyShape, Costs, drafting_place
from eval.tree_race import Candidate, finalists, race, shown, valued
from eval.tree_ranks import Text, continued
from eval.tree_search import Request, draft_name, may_win, middle_of, search_trees
from layerskip_model.errors import UserError
from layerskip_model.formats.eagle import write_eagle
from layerskip_model.formats.fingerprint import fingerprint
from layerskip_model.jsonl import read_prompts
from tests.eval.conftest import Answer
from tests.eval.decoding.eagle_heads import fitted_head

FEW = ["--num_samples", "4", "--max_steps", "12", "--dtype", "float64", "--max_nodes", "5"]


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    """What is said once a program is said in every test."""
    say.cache_clear()


@pytest.fixture
def heads(heads_run: Path, tmp_path: Path) -> Path:
    """A copy of trained heads."""
    return shutil.copytree(heads_run / "export", tmp_path / "heads")


@pytest.fixture
def eagle(finished_run: Path, tiny_target: Target, tmp_path: Path) -> Path:
    """The directory of an EAGLE head that has learnt the four texts that trees are looked for on."""
    base, place = finished_run / "export", tmp_path / "eagle"
    place.mkdir()
    rows = evenly_spaced(read_prompts(finished_run / "heldout.jsonl"), 4)
    texts = [text.tokens for text in continued(tiny_target, encode_prompts(tiny_target, rows), 24)]
    head = fitted_head("eagle", tiny_target.model, texts)
    told = {"base": str(base), "base_fingerprint": fingerprint(base)}
    write_eagle(
        place, head, head.state_dict(), dtype=torch.float32, backbone=tiny_target.runner.backbone, **told
    )
    return place


def test_what_is_foretold_is_length_over_the_cost_in_plain_steps() -> None:
    costs = Costs(plain=2.0, chain_draft={2: 0.5}, chain_verify={2: 2.5})
    found = valued(TreeShape.chain(2), 1.8, costs)
    assert (found.draft, found.verify, found.predicted) == (0.5, 2.5, pytest.approx(1.2))


def test_a_tree_that_cannot_win_is_not_measured() -> None:
    """A tree costs no less than the chain of its depth: here 4 plain steps for what no chain does better than 1.2."""
    costs = Costs(1.0, {1: 1.25, 4: 3.5}, {1: 0.25, 4: 0.5})
    chains = [valued(TreeShape.chain(depth), length, costs) for depth, length in ((1, 1.8), (4, 3.0))]
    assert max(one.predicted for one in chains) == pytest.approx(1.2)
    assert not may_win(4, [4.0, 4.7], chains, costs)
    assert may_win(4, [4.0, 4.9], chains, costs)
    assert not may_win(4, [], chains, costs)


def test_the_text_to_measure_after_is_the_median_middle() -> None:
    texts = [Text(list(range(10)), 4), Text(list(range(100)), 90), Text(list(range(20)), 10)]
    assert middle_of(texts) == list(range(15))


def pretended_costs(dear: float) -> Callable[..., Costs]:
    """Steps that cost one plain step and `dear` more for every node."""

    def costs(target: Target, make: Any, shapes: list[AnyShape], text: list[int], rule: Any) -> Costs:
        found = Costs(plain=1.0, length=len(text))
        for shape in shapes:
            if shape.is_chain:
                found.chain_draft[shape.size], found.chain_verify[shape.size] = 0.0, 1.0 + dear * shape.size
            else:
                curve, at = drafting_place(shape)
                found.tree_draft.setdefault(curve, {})[at] = 0.0
                found.tree_verify[shape.size] = 1.0 + dear * shape.size
        return found

    return costs


def pretended_race(_: Any, make: Any, racing: list[Candidate], *others: Any) -> list[Candidate]:
    """Everything goes as foretold."""
    for one in racing:
        make(one.shape)
    return [replace(one, raced=one.predicted) for one in racing]


@pytest.mark.parametrize("dear", [0.0, 0.05, 9.0])
def test_the_tree_is_as_large_as_its_rows_cost(
    tiny_target: Target, heads_run: Path, monkeypatch: pytest.MonkeyPatch, dear: float
) -> None:
    """Rows for nothing: the tree that wins most. Rows that cost nine steps each: the smallest."""
    monkeypatch.setattr(tree_search, "measure_costs", pretended_costs(dear))
    monkeypatch.setattr(tree_search, "race", pretended_race)
    found = search_trees(tiny_target, str(heads_run), Request(num_samples=6, max_steps=24, max_nodes=31))
    (search,) = found.searches
    best, rows = search.best, search.shown
    assert (search.strategy, found.texts) == ("medusa", 6)
    assert best in rows
    assert best.predicted == max(one.predicted for one in rows)
    assert best.predicted == pytest.approx(best.length / (1.0 + dear * best.shape.size))
    if dear == 9.0:
        assert best.shape.size == 1
    if dear == 0.0:
        assert best.length == max(one.length for one in rows)
        assert best.length > min(one.length for one in rows) + 0.1
    assert [one.shape.size for one in rows] == sorted(one.shape.size for one in rows)


@pytest.mark.parametrize("dear", [0.0, 9.0])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_an_eagle_head_gets_a_static_tree_and_a_growing_one_or_chains(
    tiny_target: Target, eagle: Path, monkeypatch: pytest.MonkeyPatch, dear: float, sampled: bool
) -> None:
    monkeypatch.setattr(tree_search, "measure_costs", pretended_costs(dear))
    monkeypatch.setattr(tree_search, "race", pretended_race)
    choosing = Choosing(sampled, temperature=0.7 if sampled else None)
    found = search_trees(tiny_target, str(eagle), Request("heldout", 4, 16, 15, choosing))
    static, growing = found.searches
    assert (static.strategy, growing.strategy) == ("eagle", "eagle2")
    assert isinstance(static.best.shape, TreeShape)
    assert isinstance(growing.best.shape, Shape)
    for search in found.searches:
        assert search.best in search.shown
        if dear:
            assert search.best.shape.size == 1
        else:
            assert search.best.length == max(one.length for one in search.shown) > 1.0
            assert search.best.length > 1.1
    assert len(found.accuracies) == 11


def test_a_race_is_between_kinds_and_decides_by_real_steps(
    tiny_target: Target, heads_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best chain and the best tree are always there; what hardly differs, or is hopeless, is not."""
    foretold = {TreeShape.chain(depth): 1.0 + depth / 10 for depth in (1, 2, 3)}
    wide = tuple((rank,) for rank in range(9))
    foretold |= {TreeShape("best", wide[:size]): 0.5 - size / 100 for size in (2, 8, 9)}
    candidates = [Candidate(shape, 1.5, 0.0, 1.0, value) for shape, value in foretold.items()]
    racing = finalists(candidates, 63)
    assert [one.shape.size for one in racing] == [3, 2, 2]  # chain, tree, chain: 1.1 is less than 0.85 of 1.3
    better = [replace(one, predicted=one.predicted + 0.9) for one in candidates]
    assert [(one.shape.is_chain, one.shape.size) for one in finalists(better, 63)] == [
        (True, 3),
        (False, 2),
        (True, 2),
        (True, 1),
    ]

    steps = {3: 2.0, 2: 1.5, 0: 1.0}  # of the drafters by their nodes: seconds

    def decode(runner: Any, drafter: Any, prompts: Any, **options: Any) -> list[Generation]:
        assert options["max_new_tokens"] == 8
        seconds = steps[drafter.max_nodes - 1] * len(prompts[0])  # longer prompts, slower steps
        return [Generation(tokens=[1] * 8, decode_seconds=5 * seconds, target_forwards=5)]

    monkeypatch.setattr(tree_race, "decode", decode)
    heads = loaded(tiny_target, MedusaDraft, str(heads_run))
    make = lambda shape: make_drafter("medusa", tiny_target.runner, draft=heads, tree=shape)  # noqa: E731
    texts = [Text([5] * (10 + number), 2 + number) for number in range(3)]
    raced = race(tiny_target, make, racing[:2], texts, Greedy())
    assert [one.raced for one in raced] == [pytest.approx(1.5 / 2.0), pytest.approx(1.0)]
    table = shown(candidates, raced, 63)
    assert [one.shape.size for one in table] == [1, 2, 2, 3]
    assert [one.raced is not None for one in table] == [
        False,
        True,
        False,
        True,
    ]  # a tree of two nodes before a chain


def test_the_program_saves_a_tree_that_decoding_uses(
    answer: Callable[..., Answer], finished_run: Path, heads: Path
) -> None:
    base = str(finished_run / "export")
    command = [sys.executable, "-m", "eval", "tree", "--model", base, "--draft", str(heads), *FEW]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads((heads / "tree.json").read_text())
    tree = read_tree(heads / "tree.json")
    assert 1 <= tree.size <= 5
    assert [list(path) for path in tree.paths] == content["paths"]
    told = content["searches"]["medusa"]
    assert list(content["searches"]) == ["medusa"]
    assert min(told["speedup"], told["predicted_speedup"], told["seconds"]["plain"]) > 0.0
    assert told["acceptance_length"] >= 1.0
    assert [one["head"] for one in content["accuracies"]] == [0, 1, 2, 3]
    assert [one["count"] for one in content["accuracies"]] == [48, 44, 40, 36]
    assert content["environment"]["dtype"] == "float64"
    assert "-m eval tree --model" in content["environment"]["command"]
    assert sorted(path.name for path in heads.iterdir() if path.suffix in (".part", ".tmp")) == []
    first, *_, last = [line for line in done.stdout.splitlines() if line.strip()]
    assert first.startswith("Heads, on the model's own text")
    assert last.startswith(f"tree: {heads / 'tree.json'}: ")
    assert last.endswith("medusa drafts it by default")
    assert re.search(r"^ *best (chain|tree) .*x *$", done.stdout, re.MULTILINE)

    chosen = Generator.make(load_target(base, dtype="float64"), "medusa", draft=str(heads))
    assert Medusa(chosen.target.runner, Medusa.Settings(**chosen.settings)).settings.tree.paths == tree.paths
    flags = ["--model", base, "--draft", str(heads), "--dtype", "float64", "--num_samples", "3"]
    status, _, err = answer("correctness", *flags, "--max_steps", "12", "--strategies", "medusa")
    assert (status, err) == (0, "")  # and nothing is said of a tree that is missing


def test_an_eagle_heads_file_tells_both_strategies_what_to_draft(
    answer: Callable[..., Answer], finished_run: Path, eagle: Path
) -> None:
    """And a setting that is given replaces that one."""
    base = str(finished_run / "export")
    flags = ["--model", base, "--draft", str(eagle), *FEW, "--sample", "True", "--temperature", "0.7"]
    status, out, err = answer("tree", *flags)
    assert (status, err) == (0, "")
    *_, first, second = out.splitlines()
    assert first.endswith("eagle drafts it by default")
    assert second.endswith("eagle2 drafts it by default")
    content = json.loads((eagle / "tree.json").read_text())
    assert list(content["searches"]) == ["eagle", "eagle2"]
    assert content["settings"]["choosing"]["temperature"] == 0.7
    target = load_target(base, dtype="float64")
    draft = load_eagle_draft(target, str(eagle))
    assert [list(path) for path in draft.tree.paths] == content["paths"]
    assert growth_settings(draft.growth) == content["growth"]
    wide = {"num_speculations": 4, "tree_top_k": 3, "tree_tokens": 9}
    (eagle / "tree.json").write_text(json.dumps({"growth": wide}))
    draft = load_eagle_draft(target, str(eagle))
    assert draft.tree == TreeShape.chain(5)  # the default: that file tells nothing of static trees
    for given, shape in (({}, Shape(4, 3, 9)), ({"tree_tokens": 7}, Shape(4, 3, 7))):
        assert Eagle2(target.runner, Eagle2.Settings(draft, **given)).shape == shape


DAMAGED = {
    "{": "tree.json': the file cannot be read",
    '{"growth": 5}': "tree.json': growth is 5; give num_speculations, tree_top_k, tree_tokens",
    '{"growth": {"num_speculations": 4, "tree_top_k": 2}}': "growth is {'num_speculations': 4, 'tree_top_k': 2}; give",
    '{"growth": {"num_speculations": 0, "tree_top_k": 1, "tree_tokens": 1}}': "whole numbers from 1 on",
    '{"growth": {"num_speculations": 2, "tree_top_k": 2, "tree_tokens": 7}}': "no more tokens than the levels",
    '{"growth": {"num_speculations": true, "tree_top_k": 1, "tree_tokens": 1}}': "growth is ",
    '{"paths": []}': "it has no paths",
}


def test_a_damaged_file_beside_an_eagle_head_is_one_line(tiny_target: Target, eagle: Path) -> None:
    for content, message in DAMAGED.items():
        (eagle / "tree.json").write_text(content)
        with pytest.raises(UserError) as refused:
            load_eagle_draft(tiny_target, str(eagle))
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)


def test_what_an_eagle_head_drafts_by_default_is_said(
    tiny_target: Target, eagle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chains for both strategies here; on a GPU what was published. Nothing is said of what is asked for."""
    on_gpu = torch.device("cuda")
    assert saved_growth(eagle, on_gpu) == Shape(6, 10, 60)
    assert default_tree(5, on_gpu, EAGLE_TREE).paths == published_tree("eagle_mc_sim_7b_63").paths
    draft = replace(load_eagle_draft(tiny_target, str(eagle)), growth=Shape(6, 10, 60))
    words = f"heads '{eagle}' have no tree.json: by default they draft "
    for strategy, given, said in (
        ("eagle", {}, "a chain of 5"),
        ("eagle", {"tree": "chain"}, None),
        ("eagle2", {}, "60 nodes of trees that grow 6 levels, 10 wide"),
        ("eagle2", {"tree_top_k": 1}, None),
    ):
        say_default(strategy, {"draft": draft, **given})
        err = capsys.readouterr().err
        assert err == "" if said is None else err.startswith(words + said + ";")


def test_a_run_of_heads_names_both_and_the_tree_may_go_elsewhere(
    answer: Callable[..., Answer], heads_run: Path, tmp_path: Path
) -> None:
    status, out, err = answer("tree", "--run", str(heads_run), "--output_dir", str(tmp_path / "new"), *FEW)
    assert (status, err) == (0, "")
    assert f"give it as --tree {tmp_path / 'new' / 'tree.json'}" in out
    assert not (heads_run / "export" / "tree.json").exists()
    assert read_tree(tmp_path / "new" / "tree.json").size <= 5


def test_without_a_tree_the_default_is_said_once(
    answer: Callable[..., Answer], finished_run: Path, heads: Path
) -> None:
    flags = ["--model", str(finished_run / "export"), "--draft", str(heads), "--prompt", "def"]
    medusa = ["--generation_strategy", "medusa", "--max_steps", "6"]
    for said in (1, 0):
        status, _, err = answer("generate", *flags, *medusa)
        assert status == 0
        assert err.count("have no tree.json: by default they draft a chain of 3") == said
        assert err.count("python -m eval tree") == said
    _, _, err = answer("generate", *flags, *medusa, "--tree", "chain")
    assert "tree.json" not in err


TREE = ["tree", "--model", "{base}", "--draft", "{heads}"]
GENERATE = ["generate", "--model", "{base}", "--draft", "{heads}", "--prompt", "def"]
METADATA = {"format": "pt"}
GENERATE += ["--generation_strategy", "medusa"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TREE, "--max_nodes", "0"], "--max_nodes 0: give 1 to 511"),
        ([*TREE, "--max_nodes", "512"], "--max_nodes 512: give 1 to 511"),
        ([*TREE, "--num_samples", "1"], "--num_samples 1: give 2 or more"),
        ([*TREE, "--max_steps", "1"], "--max_steps 1: give 2 or more"),
        ([*TREE, "--num_samples", "99999"], "--num_samples 99999: the dataset has only"),
        ([*TREE, "--dataset", "{tmp}/none.jsonl"], "none.jsonl: cannot be read"),
        ([*TREE, "--dataset", "{tmp}/one.jsonl"], "one.jsonl: only one prompt can be continued"),
        ([*TREE, "--output_dir", "{tmp}/one.jsonl"], "cannot be written to"),
        (["tree", "--model", "{loose}", "--draft", "{heads}"], "--dataset heldout: '{loose}' lies in no"),
        (["tree", "--model", "{base}"], "comes with no heads; name some by --draft DIR"),
        (["tree", "--run", "{run}"], "comes with no heads; name some by --draft DIR"),
        (["tree", "--model", "{base}", "--draft", "{run}"], "that run trained no heads"),
        (["tree", "--model", "{base}", "--draft", "{base}"], "has no heads that draft trees"),
        (["tree", "--model", "{base}", "--draft", "some/heads"], "some/heads' is no directory here, so give"),
        (["tree", "--model", "{other}", "--draft", "{heads}"], "its fingerprint differs"),
        ([*GENERATE, "--tree", "medusa_vicuna_7b"], "nor a published tree, did you mean 'medusa_vicuna_"),
        (
            [*GENERATE, "--tree", "{tmp}/none.json"],
            "is neither a file nor a published tree; there are chain, ",
        ),
        ([*GENERATE, "--tree", "{tmp}/wide.json"], "has rank 100000 and the model's vocabulary"),
        ([*GENERATE, "--tree", "{tmp}/orphan.json"], "the path [1, 0] has no parent; add [1]"),
    ],
)
def test_mistakes_are_one_line(
    answer: Callable[..., Answer],
    finished_run: Path,
    heads: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    loose, other = tmp_path / "loose", tmp_path / "other"
    if "{loose}" in arguments:
        shutil.copytree(finished_run / "export", loose)
    if "{other}" in arguments:  # other weights, the same sizes
        shutil.copytree(finished_run / "export", other)
        weights = load_file(other / "model.safetensors")
        save_file(
            {name: tensor + 0.1 for name, tensor in weights.items()}, other / "model.safetensors", METADATA
        )
    (tmp_path / "one.jsonl").write_text('{"prompt": "def"}\n')
    (tmp_path / "wide.json").write_text('{"paths": [[100000]]}')
    (tmp_path / "orphan.json").write_text('{"paths": [[0], [1, 0]]}')
    names = {"base": finished_run / "export", "heads": heads, "tmp": tmp_path, "run": finished_run}
    names |= {"loose": loose, "other": other}
    status, out, err = answer(*(argument.format(**names) for argument in arguments))
    assert (status, out) == (2, "")
    *_, last = err.splitlines()
    assert last.startswith("error: ")
    assert message.format(**names) in last
    assert "Traceback" not in err
    assert not (heads / "tree.json").exists()


def test_heads_are_those_named_else_the_runs(tiny_target: Target, heads_run: Path) -> None:
    assert draft_name(tiny_target, "some") == "some"
    assert draft_name(load_target(run=str(heads_run)), None) == str(heads_run / "export")
    with pytest.raises(UserError, match="comes with no heads"):
        draft_name(tiny_target, None)
