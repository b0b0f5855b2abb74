"""EAGLE heads from the command line: read from files and runs, lossless, and one line for what does not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.decoding.strategies import make_drafter
from eval.draft_heads import drafting_strategy
from eval.drafts import with_loaded_drafts
from eval.generate import Generator
from eval.results import Report
from eval.target import Target, load_target
from layerskip_model.eagle import EagleHead
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.formats.eagle import write_eagle
from layerskip_model.formats.fingerprint import fingerprint
from layerskip_model.formats.huggingface import no_progress_bar
from layerskip_model.reduced_vocabulary import ReducedVocabulary
from tests.eval.conftest import HEADS_RECIPE, Answer, trained
from tests.tiny_models import tiny_model

FEW = ["--num_samples", "3", "--max_steps", "12", "--dtype", "float64"]
PROMPT = ["--prompt", "def bert_1(value):\n"]
WORDS = 60  # of the EAGLE-3 head's vocabulary


@pytest.fixture(scope="module")
def eagle_run(finished_run: Path) -> Path:
    """The output directory of a real, short training of an EAGLE head for that run's model."""
    place, run = finished_run.parent, finished_run.parent / "eagle"
    recipe = HEADS_RECIPE.replace("kind: medusa, heads: 3", "kind: eagle, steps: 3")
    trained(place / "eagle.yaml", recipe.format(run=run, base=finished_run / "export", texts=place))
    return run


@pytest.fixture(scope="module")
def eagle3(finished_run: Path, tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an EAGLE-3 head with a reduced vocabulary, which nobody trained."""
    backbone, base = tiny_target.runner.backbone, finished_run / "export"
    torch.manual_seed(0)
    common = ReducedVocabulary.most_frequent(torch.arange(backbone.vocab_size).flip(0), WORDS)
    head = Eagle3Head(backbone, common, [1, 2, 3])
    return written(tmp_path_factory.mktemp("eagle3"), head, tiny_target, base)


def written(place: Path, head: EagleHead | Eagle3Head, target: Target, base: Path) -> Path:
    """A head on disk, for the model in `base`."""
    told = {"base": str(base), "base_fingerprint": fingerprint(base)}
    state = head.state_dict()
    write_eagle(place, head, state, dtype=torch.float32, backbone=target.runner.backbone, **told)
    return place


@pytest.fixture
def places(finished_run: Path, eagle_run: Path, eagle3: Path, heads_run: Path) -> dict[str, Path]:
    """Heads by what they are called in a test."""
    return {"eagle": eagle_run, "eagle3": eagle3, "medusa": heads_run, "model": finished_run / "export"}


@pytest.fixture
def model(finished_run: Path) -> list[str]:
    """The model, by its flag."""
    return ["--model", str(finished_run / "export")]


def test_a_run_alone_is_all_that_is_needed(
    answer: Callable[..., Answer], eagle_run: Path, model: list[str], tmp_path: Path
) -> None:
    """Its own strategy, and the other one that drafts with its head."""
    run, flags = ["--run", str(eagle_run)], ["--max_steps", "16", "--dtype", "float64", *PROMPT]
    _, plain, _ = answer("generate", *model, *flags)
    for name in ("eagle2", "eagle"):
        status, out, err = answer("generate", *run, *flags, "--generation_strategy", name)
        assert (status, out) == (0, plain), err
        words = re.search(r"acceptance length ([\d.]+)", err)
        assert words is not None
        assert float(words[1]) > 1.0

    status, out, err = answer("correctness", *run, *FEW, "--batch_size", "3")
    assert status == 0, err
    for name in ("eagle2", "eagle"):
        assert re.search(rf"^{name}, .*: 3 of 3 prompts equal$", out, re.MULTILINE), out

    status, _, err = answer("benchmark", *run, *FEW, "--output_dir", str(tmp_path))
    assert status == 0, err
    report = Report.model_validate_json((tmp_path / "report.json").read_text())
    (ours,) = (one for one in report.strategies if one.strategy == "eagle2")
    assert (ours.equal, ours.label) == (3, "eagle2")


def test_entries_draft_chains_and_trees_side_by_side(
    answer: Callable[..., Answer], model: list[str], places: dict[str, Path], tmp_path: Path
) -> None:
    """With settings of their own, greedy and sampled; the report has those in force."""
    own = f":draft={places['eagle']}"
    entries = {
        f"eagle2{own}:num_speculations=3:tree_top_k=1": [3, 1, 3],
        f"eagle2{own}:num_speculations=3:tree_top_k=2:tree_tokens=6": [3, 2, 6],
        f"eagle3:draft={places['eagle3']}:num_speculations=2:tree_top_k=3:tree_tokens=5": [2, 3, 5],
        f"eagle{own}:tree=chain:num_speculations=4": [4, None, 4],
    }
    flags = ["--dataset", str(places["eagle"] / "heldout.jsonl"), *FEW, "--output_dir", str(tmp_path)]
    status, _, err = answer("benchmark", *model, *flags, "--profile", "--strategies", ",".join(entries))
    assert status == 0, err
    report = Report.model_validate_json((tmp_path / "report.json").read_text())
    keys = ("num_speculations", "tree_top_k", "tree_tokens")
    for rows in (report.strategies, report.sampled):
        ours = {one.name: one for one in rows if one.strategy.startswith("eagle")}
        for name, sizes in entries.items():
            assert [ours[name].settings.get(key) for key in keys] == sizes
            assert ours[name].equal == ours[name].compared == 3


def test_what_is_sampled_has_the_models_own_distribution(
    answer: Callable[..., Answer], model: list[str], places: dict[str, Path]
) -> None:
    """Token by token, and by chi-square."""
    dataset = ["--dataset", str(places["eagle"] / "heldout.jsonl")]
    tree = ["--num_speculations", "2", "--tree_top_k", "2", "--tree_tokens", "4"]
    for name, place in (("eagle2", places["eagle"]), ("eagle3", places["eagle3"])):
        flags = [*model, *dataset, "--draft", str(place), "--strategies", name, *tree]
        status, out, err = answer("correctness", *flags, *FEW, "--sample", "True", "--batch_size", "3")
        assert status == 0, err
        assert re.search(rf"^{name}, .*: 3 of 3 prompts equal$", out, re.MULTILINE), out
    status, out, err = answer(
        "correctness", *flags, "--distribution", "--draws", "1000", "--tokens", "2", "--top_k", "4"
    )
    assert status == 0, err
    assert "eagle3" in out


def test_a_name_tells_its_strategy(tiny_target: Target, places: dict[str, Path]) -> None:
    """And a head is loaded once, in the target's dtype."""
    assert drafting_strategy(str(places["eagle"])) == "eagle2"
    assert drafting_strategy(str(places["eagle3"])) == "eagle3"
    settings = {"draft": str(places["eagle3"])}
    first, again = (with_loaded_drafts(tiny_target, "eagle3", settings)["draft"] for _ in range(2))
    assert first is again
    assert {parameter.dtype for parameter in first.heads.parameters()} == {torch.float64}
    assert not any(parameter.requires_grad for parameter in first.heads.parameters())


def test_generate_from_python(places: dict[str, Path]) -> None:
    """With a run's model, and what another head drafts."""
    target = load_target(run=str(places["eagle"]), dtype="float64")
    plain = Generator.make(target, max_new_tokens=8).generate(["def anna_0(", "x"])
    for name in ("eagle", "eagle2", "eagle3"):
        draft = str(places["eagle3" if name == "eagle3" else "eagle"])
        rows = Generator.make(target, name, max_new_tokens=8, draft=draft).generate(["def anna_0(", "x"])
        assert [row.tokens for row in rows] == [row.tokens for row in plain]


BAD: dict[str, tuple[str, str, list[str], str]] = {
    "no head": (
        "eagle2",
        "",
        [],
        "eagle2 needs draft: a directory of an EAGLE head, or the run that trained it",
    ),
    "a model for a head": ("eagle2", "model", [], "config.json names no head"),
    "Medusa heads": ("eagle2", "medusa", [], "are no EAGLE head; draft with the strategy medusa"),
    "for Medusa": ("medusa", "eagle", [], "these are no Medusa heads"),
    "EAGLE-3 for eagle": ("eagle", "eagle3", [], "is an EAGLE-3 head; use eagle3"),
    "EAGLE-3 for eagle2": ("eagle2", "eagle3", [], "is an EAGLE-3 head; use eagle3"),
    "EAGLE for eagle3": ("eagle3", "eagle", [], "is an EAGLE head; use eagle2, or eagle for a static tree"),
    "for a draft model": (
        "speculative_sampling",
        "eagle3",
        ["--num_speculations", "2"],
        "has no tokenizer",
    ),
    "no levels": (
        "eagle2",
        "eagle",
        ["--num_speculations", "0"],
        "num_speculations=0 is not valid; give a whole",
    ),
    "no children": (
        "eagle3",
        "eagle3",
        ["--tree_top_k", "0"],
        "tree_top_k=0 is not valid; give a whole number",
    ),
    "no nodes": (
        "eagle2",
        "eagle",
        ["--tree_tokens", "0"],
        "tree_tokens=0 is not valid; give a whole number",
    ),
    "no nodes of a static one": ("eagle", "eagle", ["--tree_tokens", "0"], "tree_tokens=0 is not valid"),
    "more than is proposed": (
        "eagle2",
        "eagle",
        ["--num_speculations", "2", "--tree_top_k", "3", "--tree_tokens", "13"],
        "tree_tokens=13 is more than the 12 drafts that num_speculations=2 and tree_top_k=3 propose",
    ),
    "longer than the context": (
        "eagle2",
        "eagle",
        ["--num_speculations", "128", "--tree_top_k", "1"],
        "num_speculations=128 does not fit the model's context of 128 tokens",
    ),
    "more than the context": (
        "eagle3",
        "eagle3",
        ["--num_speculations", "3", "--tree_top_k", "20", "--tree_tokens", "300"],
        "tree_tokens=300 does not fit the model's context of 128 tokens",
    ),
    "wider than the head's vocabulary": (
        "eagle3",
        "eagle3",
        ["--tree_top_k", str(WORDS + 1)],
        f"tree_top_k={WORDS + 1} is more than the {WORDS} tokens of the head's vocabulary",
    ),
    "wider than the model's": (
        "eagle2",
        "eagle",
        ["--tree_top_k", "301"],
        "tree_top_k=301 is more than the 300 tokens of the head's vocabulary",
    ),
    "a tree for eagle2": ("eagle2", "eagle", ["--tree", "chain"], "tree"),
    "a top-k for eagle": ("eagle", "eagle", ["--tree_top_k", "2"], "tree_top_k"),
    "no such tree": (
        "eagle",
        "eagle",
        ["--tree", "oak"],
        "tree 'oak' is neither a file nor a published tree",
    ),
    "deeper than any": (
        "eagle",
        "eagle",
        ["--tree", "chain", "--num_speculations", "11"],
        "num_speculations=11 is more than the 10 levels of tree 'chain'",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", ["generate", "benchmark", "correctness"])
def test_what_does_not_fit_is_one_line(
    answer: Callable[..., Answer], model: list[str], places: dict[str, Path], command: str, case: str
) -> None:
    strategy, head, flags, message = BAD[case]
    chosen = ["--strategies", strategy]
    if command == "generate":
        chosen = ["--generation_strategy", strategy, *PROMPT]
    draft = ["--draft", str(places[head])] if head else []
    status, out, err = answer(command, *model, *chosen, *draft, *flags)
    *said, last = err.splitlines()
    assert (status, out) == (2, "")
    assert last.startswith("error: ")
    assert message in last
    assert all(" have no tree.json: by default" in line for line in said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16, "head_dim": 4}, "another"),
        ({"intermediate_size": 40}, "another"),
        ({}, "with other weights"),
    ],
)
def test_a_head_of_another_model_is_one_line(
    answer: Callable[..., Answer],
    places: dict[str, Path],
    tmp_path: Path,
    changes: dict[str, int],
    message: str,
) -> None:
    own = load_target(str(places["model"]))
    sizes: dict[str, Any] = {"vocab_size": own.runner.backbone.vocab_size, **changes}
    with no_progress_bar():
        tiny_model(dtype=torch.float32, **sizes).save_pretrained(tmp_path)
    own.tokenizer.save_pretrained(tmp_path)
    for strategy in ("eagle", "eagle2", "eagle3"):
        draft = str(places["eagle3" if strategy == "eagle3" else "eagle"])
        flags = ["--draft", draft, "--generation_strategy", strategy, *PROMPT]
        status, _, err = answer("generate", "--model", str(tmp_path), *flags)
        assert (status, err.count("\n")) == (2, 1), err
        assert err.startswith("error: heads '")
        assert message in err


def test_what_lies_beside_a_head_is_drafted(
    answer: Callable[..., Answer], model: list[str], tiny_target: Target, tmp_path: Path
) -> None:
    """And what is given comes in its place."""
    base = Path(model[1])
    head = EagleHead(tiny_target.runner.backbone)
    place = written(tmp_path, head, tiny_target, base)
    growth = {"num_speculations": 2, "tree_top_k": 3, "tree_tokens": 7}
    (place / "tree.json").write_text(json.dumps({"paths": [[0], [1], [0, 0]], "growth": growth}))
    for entry, found in (
        ("eagle2", [2, 3, 7]),
        ("eagle2:num_speculations=3", [3, 3, 7]),
        ("eagle2:tree_top_k=1", [2, 1, 2]),
        ("eagle", [2, None, 3]),
    ):
        name, *given = entry.split(":")
        settings: dict[str, Any] = {key: int(value) for key, value in (one.split("=") for one in given)}
        generator = Generator.make(tiny_target, name, draft=str(place), **settings)
        made = make_drafter(name, tiny_target.runner, **generator.settings).settings
        assert [getattr(made, key, None) for key in growth] == found
