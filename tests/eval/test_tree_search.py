"""`python -m eval tree`: which tree is chosen, the file that it leaves, what uses it, and one line for mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval import tree_search
from eval.decoding.drafters.medusa import Medusa
from eval.decoding.published_trees import published_tree
from eval.decoding.static_tree import TreeShape, read_tree
from eval.draft_heads import default_tree, fitting, named_tree, say
from eval.generate import Generator
from eval.target import Target, load_target
from eval.tree_costs import Costs, sizes_to_measure
from eval.tree_ranks import Text
from eval.tree_search import Request, Shapes, draft_name, middle_of, search_tree, valued
from layerskip_model.errors import UserError
from tests.eval.conftest import Answer

FEW = ["--num_samples", "4", "--max_steps", "12", "--dtype", "float64", "--max_nodes", "5"]


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    """What is said once a program is said in every test."""
    say.cache_clear()


@pytest.fixture
def heads(heads_run: Path, tmp_path: Path) -> Path:
    """A copy of trained heads."""
    return shutil.copytree(heads_run / "export", tmp_path / "heads")


def shares(*rows: list[int], times: int = 3) -> list[torch.Tensor]:
    """Texts with these ranks at every place."""
    return [torch.tensor([row] * times) for row in rows]


def test_a_trees_length_is_measured_on_texts_that_it_was_not_made_from() -> None:
    """One half of the texts goes on by rank 1, the other by rank 2: what one half teaches is wrong for the other."""
    ranks = shares([1, 0], [2, 0], [1, 0], [2, 0], times=9)
    shapes = Shapes(ranks, 6)
    two = {shape.size: shape for shape in shapes.all() if shape.depth == 1 and not shape.is_chain}[2]
    assert set(two.paths) == {(1,), (2,)}  # all texts together know both
    assert shapes.length(two) == 1.0
    alike = Shapes(shares([1, 0], [1, 0], times=9), 6)
    (one,) = (shape for shape in alike.all() if shape.size == 1 and shape != TreeShape.chain(1))
    assert one.paths == ((1,),)
    assert alike.length(one) == 2.0  # 8 tokens after the first one in 4 steps
    assert alike.length(TreeShape.chain(1)) == 1.0


def test_every_tree_is_looked_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = list(torch.randint(4, (4, 40, 3, 2), generator=generator).amin(dim=-1))
    shapes = Shapes(ranks, 20)
    found = list(shapes.all())
    assert len({shape.paths for shape in found}) == len(found)
    assert [shape.size for shape in found if shape.is_chain] == [1, 2, 3]
    sizes = {depth: [s.size for s in found if s.depth == depth and not s.is_chain] for depth in (1, 2, 3)}
    assert sizes[1][-1] == 4  # there are no more ranks
    assert sizes[2] == list(range(sizes[2][0], 21))
    assert sizes[3] == list(range(sizes[3][0], 21))
    measured = list(shapes.to_measure())
    assert {s.size for s in measured if not s.is_chain} <= set(sizes_to_measure(20))
    assert {(s.depth, s.is_chain) for s in measured} == {(s.depth, s.is_chain) for s in found}


def test_speedup_is_length_over_the_cost_in_plain_steps() -> None:
    costs = Costs(plain=2.0, chain_draft={2: 0.5}, chain_verify={2: 2.5})
    found = valued(TreeShape.chain(2), 1.8, costs)
    assert (found.draft, found.verify, found.speedup) == (0.5, 2.5, pytest.approx(1.2))


def test_the_text_to_measure_after_is_the_median_middle() -> None:
    texts = [Text(list(range(10)), 4), Text(list(range(100)), 90), Text(list(range(20)), 10)]
    assert middle_of(texts) == list(range(15))


@pytest.mark.parametrize("dear", [0.0, 0.05, 9.0])
def test_the_tree_is_as_large_as_its_rows_cost(
    tiny_target: Target, heads_run: Path, monkeypatch: pytest.MonkeyPatch, dear: float
) -> None:
    """Rows for nothing: the tree that wins most. Rows that cost nine steps each: the smallest."""

    def costs(target: Target, make: Any, shapes: list[TreeShape], text: list[int]) -> Costs:
        found = Costs(plain=1.0, length=len(text))
        for shape in shapes:
            if shape.is_chain:
                found.chain_draft[shape.size], found.chain_verify[shape.size] = 0.0, 1.0 + dear * shape.size
            else:
                found.tree_draft.setdefault(shape.depth, {})[shape.size] = 0.0
                found.tree_verify[shape.size] = 1.0 + dear * shape.size
        return found

    monkeypatch.setattr(tree_search, "measure_costs", costs)
    found = search_tree(tiny_target, str(heads_run), Request(num_samples=6, max_steps=24, max_nodes=31))
    best = found.best
    assert best in found.shown
    assert best.speedup == max(one.speedup for one in found.shown)
    assert best.speedup == pytest.approx(best.length / (1.0 + dear * best.shape.size))
    if dear == 9.0:
        assert best.shape.size == 1
    if dear == 0.0:
        assert best.length == max(one.length for one in found.shown)
        assert best.length > min(one.length for one in found.shown) + 0.1
    assert [one.shape.size for one in found.shown] == sorted(one.shape.size for one in found.shown)


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
    assert content["predicted_speedup"] > 0.0
    assert content["acceptance_length"] >= 1.0
    assert [one["head"] for one in content["accuracies"]] == [0, 1, 2, 3]
    assert [one["count"] for one in content["accuracies"]] == [48, 44, 40, 36]
    assert content["environment"]["dtype"] == "float64"
    assert "-m eval tree --model" in content["environment"]["command"]
    assert content["seconds"]["plain"] > 0.0
    assert sorted(path.name for path in heads.iterdir() if path.suffix in (".part", ".tmp")) == []
    first, *_, last = [line for line in done.stdout.splitlines() if line.strip()]
    assert first.startswith("Heads, on the model's own text")
    assert last.startswith(f"tree: {heads / 'tree.json'}: ")
    assert last.endswith("medusa drafts it by default")
    assert " (best) " in done.stdout

    chosen = Generator.make(load_target(base, dtype="float64"), "medusa", draft=str(heads))
    assert Medusa(chosen.target.runner, Medusa.Settings(**chosen.settings)).settings.tree.paths == tree.paths
    flags = ["--model", base, "--draft", str(heads), "--dtype", "float64", "--num_samples", "3"]
    status, _, err = answer("correctness", *flags, "--max_steps", "12", "--strategies", "medusa")
    assert (status, err) == (0, "")  # and nothing is said of a tree that is missing


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


def test_the_default_tree_depends_on_the_device() -> None:
    assert default_tree(3, torch.device("cpu")).is_chain
    on_gpu = default_tree(3, torch.device("cuda"))
    assert (on_gpu.size, on_gpu.depth) == (61, 3)


def test_trees_by_name_are_cut_to_the_heads_which_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert named_tree("medusa_vicuna_7b_stage1", 4).paths == published_tree("medusa_vicuna_7b_stage1").paths
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert named_tree("eagle_mc_sim_7b_63", 2).size == 12
    said = "tree 'eagle_mc_sim_7b_63' has 5 levels and there are 2 heads: cut to 12 of its 25 nodes\n"
    assert capsys.readouterr().err == said
    assert fitting(TreeShape.chain(3), 3) == TreeShape.chain(3)


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
