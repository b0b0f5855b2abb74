from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from layerskip_model.errors import UserError
from tests.train.small_recipe import small_values, write_documents
from train import recipe_docs
from train.config import Recipe, load_recipe, parse_recipe
from train.objectives import OBJECTIVES, LayerSkip
from train.optimizer_config import ScheduleConfig
from train.section import FrozenModelSection

ROOT = Path(__file__).parents[2]


def write_yaml(directory: Path, values: dict[str, Any]) -> Path:
    path = directory / "r.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


# --- overrides and interpolation


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_yaml(tmp_path, small_values())


def test_overrides_replace_values_and_make_new_ones(path: Path) -> None:
    overrides = (
        "optimizer.lr=1e-3|log.wandb.project=x|data.train.0.files=[a, b]|batch.micro=2|max_steps=|epochs=0.5"
    )
    recipe = load_recipe(path, [*overrides.split("|"), "schedule={kind: linear}"])
    assert recipe.optimizer.lr == 0.001
    assert recipe.log.wandb is not None
    assert recipe.log.wandb.project == "x"
    assert recipe.data.train[0].files == ["a", "b"]  # type: ignore[union-attr]
    assert (recipe.batch.micro, recipe.max_steps, recipe.epochs) == (2, None, 0.5)
    assert recipe.schedule == ScheduleConfig(kind="linear")  # warmup_steps: 2 went with the old mapping


def test_a_mapping_replaces_the_old_one_whole(path: Path) -> None:
    recipe = load_recipe(path, ["optimizer={kind: muon, lr: 0.1, adamw_lr: 0.01}"])
    assert recipe.optimizer.kind == "muon"
    assert recipe.optimizer.clip_norm == 1.0  # the recipe's own was 0.5


def test_later_overrides_win_and_values_may_hold_equals_signs(path: Path) -> None:
    assert load_recipe(path, ["seed=1", "seed=2"]).seed == 2
    assert load_recipe(path, ["output_dir=a=b"]).output_dir == "a=b"
    assert load_recipe(path, ["output_dir='3'"]).output_dir == "3"


def test_interpolation_sees_overrides(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, small_values(seed=1, output_dir="runs/${seed}/${optimizer.kind}"))
    assert load_recipe(path, ["seed=7"]).output_dir == "runs/7/adamw"
    assert load_recipe(path, ["max_steps=${batch.length}"]).max_steps == 16


def test_a_recipe_is_its_own_dump_and_cannot_be_changed(path: Path) -> None:
    recipe = load_recipe(path)
    dumped = recipe.model_dump(mode="json")
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(dumped))) == recipe
    assert dumped["objective"]["early_exit"]["every"] == 2  # the method's own keys are in it
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


# --- schedules and the length of the run


def naive_factor(kind: str, warmup: int, final: float, step: int, total: int) -> float:
    """Steps 0..warmup-1 climb in equal parts to 1; the others fall from just under 1 to `final` at the last one."""
    if step < warmup:
        return [(i + 1) / warmup for i in range(warmup)][step]
    falling = range(1, total - warmup + 1)
    fractions = [i / len(falling) for i in falling]
    curve = {
        "constant": [1.0 for _ in fractions],
        "linear": [1.0 + (final - 1.0) * x for x in fractions],
        "cosine": [final + (1.0 - final) * (1.0 + math.cos(math.pi * x)) / 2.0 for x in fractions],
    }
    return curve[kind][step - warmup]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (3, 7), (6, 7), (7, 7), (1, 100)])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_schedule_equals_its_naive_twin(
    kind: Literal["cosine", "linear", "constant"], warmup: int, total: int, final: float
) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, final_fraction=final)
    factors = [schedule.factor(step, total) for step in range(total)]
    expected = [naive_factor(kind, warmup, final, step, total) for step in range(total)]
    assert factors == pytest.approx(expected, abs=1e-12)
    if kind != "constant" and warmup < total:
        assert factors[-1] == pytest.approx(final, abs=1e-12)


@pytest.mark.parametrize(
    ("length", "sequences", "steps"),
    [
        ({"max_steps": 11}, 5, 11),
        ({"max_tokens": 8 * 16 * 3}, 5, 3),
        ({"max_tokens": 8 * 16 * 3 + 1}, 5, 4),
        ({"epochs": 2.0}, 20, 5),
        ({"epochs": 0.5}, 41, 3),
    ],
)
def test_the_number_of_steps(length: dict[str, Any], sequences: int, steps: int) -> None:
    recipe = parse_recipe(small_values(max_steps=None) | length).with_total_steps(sequences)
    assert recipe.total_steps == steps
    assert (recipe.max_tokens, recipe.epochs) == (None, None)


def test_a_warm_up_longer_than_the_epochs_is_refused_when_they_are_known() -> None:
    recipe = parse_recipe(small_values(max_steps=None, epochs=1.0))
    assert recipe.with_total_steps(16).total_steps == 2
    with pytest.raises(UserError, match=r"^schedule\.warmup_steps: 2 is more than the 1 steps of the run$"):
        recipe.with_total_steps(8)


# --- frozen weights may be bfloat16


class HeadsConfig(FrozenModelSection):
    kind: Literal["heads"]


class Heads(LayerSkip):
    config_class = HeadsConfig


def test_a_frozen_model_may_be_loaded_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "heads", Heads)
    model = {"name_or_path": "x", "dtype": "bfloat16"}
    recipe = parse_recipe(small_values(model=model, objective={"kind": "heads"}))
    assert recipe.model.dtype == "bfloat16"
    with pytest.raises(UserError, match=r"model\.dtype: bfloat16 is for frozen weights"):
        parse_recipe(small_values(model=model))


# --- docs/recipes.md


def test_the_committed_page_is_current() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert page == recipe_docs.render(), "run python -m train.recipe_docs > docs/recipes.md"


def test_every_key_is_described() -> None:
    seen = 0
    for path, section in recipe_docs.sections("", Recipe):
        assert section.__doc__, path
        for name, field in section.model_fields.items():
            assert len(recipe_docs.description(name, field)) > 3, f"{path}.{name}"
            seen += 1
    assert seen > 50


def test_the_page_tells_types_bounds_and_defaults() -> None:
    page = recipe_docs.render()
    assert "| `p_max` | number ≥ 0, < 1 | required | the largest dropout rate" in page
    assert "| `kind` | `cosine`, `linear`, `constant` | `cosine` |" in page
    assert "| `exits` | `all` or list of whole numbers | `all` |" in page
    for kind in ("data.train: {kind: jsonl}", "optimizer: {kind: muon}", "objective: {kind: layerskip}"):
        assert page.count(f"## `{kind}`") == 1


# --- the command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "RECIPE optimizer.lrr=1",
            "RECIPE: optimizer.lrr: unknown key (value 1); did you mean 'lr'? valid: ",
        ),
        ("RECIPE data.train.0.files=[no-*.txt]", "data source 'no-*.txt' matches no file in "),
        ("missing.yaml", "recipe missing.yaml: no such file"),
        ("RECIPE --frsh", "No such option: --frsh"),
        ("", "Missing argument"),
    ],
)
def test_a_bad_command_is_one_line_and_status_2(tmp_path: Path, arguments: str, expected: str) -> None:
    data = {"train": [{"kind": "text", "files": write_documents(tmp_path)}]}
    recipe = write_yaml(tmp_path, small_values(output_dir=str(tmp_path / "out"), data=data))
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "train", *arguments.replace("RECIPE", str(recipe)).split()]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    lines = process.stderr.splitlines()
    assert process.returncode == 2
    assert process.stdout == ""
    assert lines[0].startswith(f"error: {expected.replace('RECIPE', str(recipe))}")
    assert lines[1:] in ([], ["see: python -m train --help"])
    assert sorted(tmp_path.rglob("*")) == before


def test_typing_errors_need_not_wait_for_torch() -> None:
    code = "import sys, train.__main__, train.recipe_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
