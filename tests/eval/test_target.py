"""Loading what is evaluated, and reading the run that made it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from eval.target import Target, load_target, open_run
from layerskip_model.errors import UserError


def test_a_run_and_its_export_are_the_same_target(finished_run: Path) -> None:
    by_run = load_target(run=str(finished_run))
    by_model = load_target(str(finished_run / "export"))
    for target in (by_run, by_model):
        assert target.run is not None
        assert target.run.directory == finished_run
        assert target.run.length == 32
        assert target.runner.dtype == torch.float32
        assert set(target.run.suggested) == {"exit_layer", "num_speculations"}
        assert target.name == str(finished_run / "export")


def test_only_a_runs_own_export_has_that_run(
    finished_run: Path, tmp_path: Path, run_without: Callable[..., Path]
) -> None:
    (tmp_path / "moved").symlink_to(finished_run / "export")
    assert load_target(str(tmp_path / "moved")).run is None
    run = run_without()
    shutil.copytree(run / "export", run / "another")
    assert load_target(str(run / "another")).run is None
    assert load_target(str(run / "export")).run is not None


def test_options_reach_the_model(finished_run: Path) -> None:
    target = load_target(run=str(finished_run), dtype="bfloat16", attn_implementation="eager", device="cpu")
    assert target.runner.dtype == torch.bfloat16
    assert target.model.config._attn_implementation == "eager"


def test_loading_is_silent_and_leaves_the_bars_as_they_were(
    finished_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for enable in (transformers_logging.disable_progress_bar, transformers_logging.enable_progress_bar):
        enable()
        before = transformers_logging.is_progress_bar_enabled()
        load_target(run=str(finished_run))
        assert transformers_logging.is_progress_bar_enabled() == before
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_training_points_are_the_log(finished_run: Path) -> None:
    points = open_run(finished_run).training_points()
    assert [(point.step, point.tokens) for point in points] == [(s, s * 8 * 32) for s in (8, 16, 24)]
    assert points[0].loss > points[-1].loss
    assert points[0].heldout is None
    heldout = points[-1].heldout
    assert heldout is not None
    assert set(heldout) == {1, 2, 3, 4}
    assert heldout[4] < heldout[1]


@pytest.mark.parametrize("content", ["batch: 3", "[", "batch: {sequences: many, length: 3}", ""])
def test_a_damaged_recipe_is_one_line(run_without: Callable[..., Path], content: str) -> None:
    run = open_run(run_without(recipe_yaml=content))
    with pytest.raises(UserError, match=r"recipe.yaml is damaged") as caught:
        _ = run.length
    assert "\n" not in str(caught.value)


def test_end_tokens_come_from_the_model_else_the_tokenizer(tiny_target: Target) -> None:
    model = copy.copy(tiny_target.model)
    model.generation_config = copy.deepcopy(model.generation_config)
    target = Target("x", model, tiny_target.tokenizer, tiny_target.runner)
    assert model.generation_config is not None
    for given, expected in ((7, [7]), ([7, 8], [7, 8]), (None, [tiny_target.tokenizer.eos_token_id])):
        model.generation_config.eos_token_id = given
        assert target.eos_token_ids == expected


def test_prompts_that_are_no_text(tiny_target: Target) -> None:
    assert tiny_target.encode("def") == tiny_target.tokenizer("def")["input_ids"]
    for wrong, message in (("", "is empty"), ("a\udcff", "not valid UTF-8")):
        with pytest.raises(UserError, match=message):
            tiny_target.encode(wrong)
