"""Loading what is evaluated, and reading the run that made it."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

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


# What the command line says of a place, and what of it is wrong.
WRONG_PLACES: list[tuple[dict[str, str], str]] = [
    ({"device": "cpu", "device_map": "auto"}, "--device 'cpu' and --device_map 'auto': give one of the two"),
    ({"device_map": "cpu"}, "--device_map 'cpu' is not one of auto, balanced, balanced_low_0, sequential;"),
    ({"device": "meta"}, "--device 'meta' cannot be used here"),
    ({"device": "gpu"}, "--device 'gpu' cannot be used here"),
    ({"quantization": "3bit"}, "--quantization '3bit' is not one of 4bit, 8bit"),
    ({"quantization": "4bit", "dtype": "float64"}, "--quantization 4bit cannot compute in float64"),
    ({"quantization": "8bit", "device": "cpu"}, "--quantization 8bit needs a CUDA GPU"),
    ({"attn_implementation": "flash"}, "--attn_implementation 'flash' is not one of sdpa, eager, flash_att"),
    (
        {"attn_implementation": "flash_attention_2", "device": "cpu", "dtype": "bfloat16"},
        "--attn_implementation flash_attention_2 needs a GPU and --dtype bfloat16 or float16",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_PLACES)
def test_a_wrong_place_is_one_line(finished_run: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_target(run=str(finished_run), **wrong)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As if there were a GPU: what the model would be loaded with."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("eval.target.load_model", lambda name, **how: told.update(how))
    monkeypatch.setattr("eval.target.Runner", lambda model: None)
    return told


def test_the_flags_reach_the_loading(
    finished_run: Path, on_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    load_target(run=str(finished_run), quantization="4bit")
    assert (on_gpu["quantization"], on_gpu["dtype"]) == ("4bit", "bfloat16")
    assert on_gpu["device_map"] == torch.device("cuda")
    load_target(
        run=str(finished_run), device_map="auto", dtype="float16", attn_implementation="flash_attention_2"
    )
    assert (on_gpu["device_map"], on_gpu["quantization"]) == ("auto", None)
    assert (on_gpu["dtype"], on_gpu["attn_implementation"]) == ("float16", "flash_attention_2")


@pytest.mark.parametrize("wrong", [{"dtype": "float32"}, {"dtype": "float64"}])
def test_flash_attention_wants_half_precision(
    finished_run: Path, on_gpu: dict[str, Any], wrong: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=f"not {wrong['dtype']} on a GPU"):
        load_target(run=str(finished_run), attn_implementation="flash_attention_2", **wrong)
    assert not on_gpu


def test_bitsandbytes_that_is_not_there_is_one_line(
    finished_run: Path, on_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"--quantization 8bit needs bitsandbytes \(pip install") as caught:
        load_target(run=str(finished_run), quantization="8bit")
    assert "\n" not in str(caught.value)
    assert not on_gpu


def test_a_device_map_on_a_machine_without_gpu(finished_run: Path) -> None:
    target = load_target(run=str(finished_run), device_map="auto")
    assert target.runner.device == torch.device("cpu")
    assert target.runner.dtype == torch.float32


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
