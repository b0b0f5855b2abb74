"""Hydra heads from the command line: read from files, in the target's dtype, and lossless."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eval.draft_heads import drafting_strategy
from eval.drafts import with_loaded_drafts
from eval.results import Report
from eval.target import Target
from layerskip_model.formats.fingerprint import fingerprint
from layerskip_model.formats.hydra import write_hydra
from layerskip_model.hydra import HydraHeads
from tests.eval.conftest import Answer

FEW = ["--num_samples", "3", "--max_steps", "12", "--dtype", "float64"]
TREE = [[0], [1], [0, 0], [1, 0], [0, 1]]


@pytest.fixture(scope="module")
def heads(finished_run: Path, tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of two heads with prefix attention, which begin as the LM head, and their tree."""
    place, base = tmp_path_factory.mktemp("hydra"), finished_run / "export"
    torch.manual_seed(0)
    made = HydraHeads.new(tiny_target.runner.backbone, heads=2, layers=2, prefix_attention=True)
    told = {"base": str(base), "base_fingerprint": fingerprint(base)}
    write_hydra(place, made, made.state_dict(), dtype=torch.float32, **told)
    (place / "tree.json").write_text(json.dumps({"paths": TREE}))
    return place


def test_every_command_drafts_with_them(
    answer: Callable[..., Answer], finished_run: Path, heads: Path, tmp_path: Path
) -> None:
    """Their name tells the strategy to a check; a benchmark takes entries with less of the tree."""
    both = ["--model", str(finished_run / "export"), "--draft", str(heads)]
    dataset = ["--dataset", str(finished_run / "heldout.jsonl"), *FEW]
    flags = ["--max_steps", "16", "--dtype", "float64", "--prompt", "def bert_1(value):\n"]
    _, plain, _ = answer("generate", *both[:2], *flags)
    assert answer("generate", *both, "--generation_strategy", "hydra", *flags)[:2] == (0, plain)

    status, out, err = answer("correctness", *both, *dataset, "--batch_size", "3")
    assert status == 0, err
    assert re.search(r"^hydra, .*: 3 of 3 prompts equal$", out, re.MULTILINE), out

    entries = ["--strategies", "hydra,hydra:tree_tokens=2", "--output_dir", str(tmp_path)]
    status, _, err = answer("benchmark", *both, *dataset, *entries)
    assert status == 0, err
    report = Report.model_validate_json((tmp_path / "report.json").read_text())
    ours = [one for one in report.strategies if one.name.startswith("hydra")]
    assert [one.settings["tree_tokens"] for one in ours] == [5, 2]
    assert [one.equal for one in ours] == [3, 3]


def test_they_are_loaded_in_the_targets_dtype(tiny_target: Target, heads: Path) -> None:
    """Once, and with what runs their prefix attention."""
    settings = {"draft": str(heads)}
    draft, again = (with_loaded_drafts(tiny_target, "hydra", settings)["draft"] for _ in range(2))
    assert draft is again
    assert {parameter.dtype for parameter in draft.heads.parameters()} == {torch.float64}
    assert not any(parameter.requires_grad for parameter in draft.heads.parameters())
    assert (draft.number, [list(path) for path in draft.tree.paths]) == (2, TREE)
    assert draft.prefix is not None
    assert draft.prefix.fused is not None
    assert drafting_strategy(str(heads)) == "hydra"


def test_heads_of_another_strategy_are_one_line(
    answer: Callable[..., Answer], finished_run: Path, heads: Path, heads_run: Path
) -> None:
    for name, place, message in (
        ("medusa", heads, "these are no Medusa heads"),
        ("hydra", heads_run, "these are no Hydra heads"),
    ):
        flags = ["--model", str(finished_run / "export"), "--draft", str(place), "--prompt", "def"]
        status, out, err = answer("generate", *flags, "--generation_strategy", name)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
        assert message in err
