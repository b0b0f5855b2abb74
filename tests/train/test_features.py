"""Features that are cached teach what online ones teach; they are made once, and only used where they belong."""

from __future__ import annotations

import json
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.target import open_run
from layerskip_model.backbone import Backbone
from layerskip_model.formats.features import FeatureFiles
from layerskip_model.formats.huggingface import load_model
from tests.tiny_models import tiny_model
from tests.train.small_recipe import small_values
from tests.train.tiny_heads import medusa_values, write_base
from tests.train.tiny_runs import at_step, log_lines, start, write_recipe
from tests.train.tiny_runs import write_text as write_text_into
from train import Interrupted, Recipe, UserError, features, parse_recipe, train
from train.data.packing import Rows
from train.objectives.medusa import Medusa

ROW_BYTES = 16 * 32 * 4  # of a row of float32
EPOCHS: dict[str, Any] = {"max_steps": None, "epochs": 2.5, "checkpoint": {"every": 4, "keep": 99}}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_into(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def base(text: Path) -> Path:
    return write_base(text / "base", text)


@pytest.fixture(scope="module")
def online(text: Path, base: Path) -> Path:
    """A run of two and a half epochs whose model runs in every step."""
    return train(parse_recipe(medusa_values(text / "online", text, base, **EPOCHS)))


@pytest.fixture(scope="module")
def cached(text: Path, base: Path) -> Path:
    """The same run with features in text / "cache"."""
    return train(recipe_of(text / "cached", text, base, cache=text / "cache", **EPOCHS))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SHARD_BYTES", 10 * ROW_BYTES + 1)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each forward of the model has had."""
    seen: list[int] = []
    original = Backbone.final_states

    def final_states(self: Backbone, input_ids: Tensor, *rest: Any) -> Tensor:
        seen.append(len(input_ids))
        return original(self, input_ids, *rest)

    monkeypatch.setattr(Backbone, "final_states", final_states)
    return seen


def recipe_of(
    output_dir: Path, text: Path, base: Path, *, cache: Path, dtype: str = "float32", **changes: Any
) -> Recipe[Any]:
    kept = {"cache": str(cache), "dtype": dtype}
    return parse_recipe(medusa_values(output_dir, text, base, features=kept, **changes))


def heads_of(run: Path) -> bytes:
    folder = open_run(run).heads
    assert folder is not None
    (weights,) = folder.glob("*lm_head.safetensors")
    return weights.read_bytes()


def shards_of(cache: Path, part: str = "train") -> dict[str, Any]:
    return json.loads((cache / part / "manifest.json").read_text())["shards"]


def test_cached_float32_features_teach_what_online_ones_do(online: Path, cached: Path) -> None:
    """The same losses, held-out numbers and exported bytes."""
    assert log_lines(cached) == log_lines(online)
    assert heads_of(cached) == heads_of(online)
    numbers = [json.loads((run / "run.json").read_text())["heldout_metrics"] for run in (online, cached)]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("documents", ["separate", "joined"])
def test_what_is_kept_is_what_the_model_says(
    documents: str, text: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row by itself through the model, its packed documents kept apart, and every row of the run is there."""
    seen: list[Rows] = []
    original = features.fill

    def fill(run: Any, part: Any) -> None:
        seen.append(part.windows)
        original(run, part)

    monkeypatch.setattr(features, "fill", fill)
    data = medusa_values(tmp_path, text, base)["data"] | {"documents": documents}
    train(recipe_of(tmp_path / "run", text, base, cache=tmp_path / "cache", data=data, **EPOCHS))
    model = load_model(str(base)).eval()
    for part, windows in zip(("train", "heldout"), seen, strict=True):
        files = FeatureFiles(tmp_path / "cache" / part)
        places = files.places()
        assert places.keys() == set(range(len(windows)))
        for number in range(0, len(windows), 7):
            row = {key: values[None] for key, values in windows[number].items() if key != "labels"}
            with torch.no_grad():
                (expected,) = model.model(**row, use_cache=False).last_hidden_state
            torch.testing.assert_close(files.read(places[number]), expected, rtol=1e-5, atol=1e-5)


def test_a_second_run_does_not_run_the_model(
    cached: Path, text: Path, base: Path, tmp_path: Path, forwards: list[int]
) -> None:
    """Neither the same recipe nor one for other heads, in another order; both evaluate, too."""
    cache = text / "cache"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    other: dict[str, Any] = {
        "objective": {"heads": 2, "layers": 2, "shared_projection": True},
        "seed": 3,
        "max_steps": 5,
    }
    train(recipe_of(tmp_path / "again", text, base, cache=cache, **EPOCHS))
    train(recipe_of(tmp_path / "other", text, base, cache=cache, **other))
    assert forwards == []
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == before
    assert heads_of(tmp_path / "again") == heads_of(cached)
    train(parse_recipe(medusa_values(tmp_path / "online", text, base, **other)))
    assert log_lines(tmp_path / "other") == log_lines(tmp_path / "online")
    assert heads_of(tmp_path / "other") == heads_of(tmp_path / "online")


def test_hydra_heads_learn_from_the_same_features(
    cached: Path, text: Path, base: Path, tmp_path: Path, forwards: list[int]
) -> None:
    """With a layer over them, dropout, and the model's own distribution as the teacher."""
    hydra = {"kind": "hydra", "layers": 2, "prefix_attention": True, "dropout": 0.2}
    train(recipe_of(tmp_path / "run", text, base, cache=text / "cache", objective=hydra, **EPOCHS))
    assert forwards == []
    train(parse_recipe(medusa_values(tmp_path / "online", text, base, objective=hydra, **EPOCHS)))
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "online")
    assert heads_of(tmp_path / "run") == heads_of(tmp_path / "online")


def test_only_rows_that_the_run_reads_are_made(
    text: Path, base: Path, tmp_path: Path, forwards: list[int], small_shards: None
) -> None:
    """A longer run, or one in another order, adds what it lacks."""
    cache = tmp_path / "cache"
    settings: dict[str, Any] = {"cache": cache, "evaluate": {"sequences": 5}}
    train(recipe_of(tmp_path / "short", text, base, max_steps=2, **settings))
    assert sum(forwards) == 2 * 8 + 5
    assert [shard["rows"] for shard in shards_of(cache).values()] == [10, 6]
    forwards.clear()
    train(recipe_of(tmp_path / "longer", text, base, max_steps=4, **settings))
    assert sum(forwards) == 2 * 8
    forwards.clear()
    train(recipe_of(tmp_path / "seeded", text, base, max_steps=4, seed=5, **settings))
    assert 0 < sum(forwards) < 4 * 8
    train(parse_recipe(medusa_values(tmp_path / "online", text, base, max_steps=4, seed=5)))
    assert heads_of(tmp_path / "seeded") == heads_of(tmp_path / "online")


def test_bfloat16_features_are_near(online: Path, text: Path, base: Path, tmp_path: Path) -> None:
    """They are rounded to 8 bits; the heads learn the same to about that. Half the size."""
    run = train(recipe_of(tmp_path / "run", text, base, cache=tmp_path / "cache", dtype="bfloat16", **EPOCHS))
    for ours, theirs in zip(log_lines(run), log_lines(online), strict=True):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    assert heads_of(run) != heads_of(online)
    (shard,) = shards_of(tmp_path / "cache").values()
    assert shard["bytes"] == pytest.approx(shard["rows"] * ROW_BYTES / 2, rel=0.03)


def test_features_of_a_bfloat16_model_lose_nothing(text: Path, base: Path, tmp_path: Path) -> None:
    model = {"dtype": "bfloat16"}
    train(recipe_of(tmp_path / "run", text, base, cache=tmp_path / "cache", dtype="bfloat16", model=model))
    train(parse_recipe(medusa_values(tmp_path / "online", text, base, model=model)))
    assert heads_of(tmp_path / "run") == heads_of(tmp_path / "online")


def test_stopped_in_the_second_epoch_equals_never_stopped(
    cached: Path, text: Path, base: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path / "run", text, base, cache=text / "cache", **EPOCHS)
    with at_step(15, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train(recipe)  # an epoch is 78 rows, near ten steps
    train(recipe)
    assert heads_of(tmp_path / "run") == heads_of(cached)
    assert log_lines(tmp_path / "run") == log_lines(cached)


@pytest.mark.parametrize("place", ["write", "enlist"])
def test_killed_while_filling_goes_on_where_it_was(
    place: str,
    cached: Path,
    text: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forwards: list[int],
    small_shards: None,
) -> None:
    recipe = recipe_of(tmp_path / "run", text, base, cache=tmp_path / "cache", **EPOCHS)
    original, calls = getattr(FeatureFiles, place), []

    def dying(self: FeatureFiles, *rest: Any) -> None:
        calls.append(rest)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureFiles, place, dying)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert len(shards_of(tmp_path / "cache")) == 2
    forwards.clear()
    train(recipe)
    assert sum(forwards) == 78 - 20 + len(FeatureFiles(tmp_path / "cache" / "heldout").places())
    assert len(shards_of(tmp_path / "cache")) == 8
    assert heads_of(tmp_path / "run") == heads_of(cached)


def test_a_torn_shard_is_made_again(
    cached: Path,
    text: Path,
    base: Path,
    tmp_path: Path,
    forwards: list[int],
    small_shards: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    train(recipe_of(tmp_path / "first", text, base, cache=cache, **EPOCHS))
    torn = cache / "train" / "features-00004.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    forwards.clear()
    train(recipe_of(tmp_path / "second", text, base, cache=cache, **EPOCHS))
    assert "features-00004.safetensors is damaged; its rows are made again" in capfd.readouterr().err
    assert sum(forwards) == 10
    assert heads_of(tmp_path / "second") == heads_of(cached)


def other_weights(text: Path, base: Path, tmp_path: Path) -> dict[str, Any]:
    """One bit of the backbone's last byte, under the same name."""
    shutil.copytree(base, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    next(iter(weights.values())).view(torch.int32).flatten()[0] ^= 1
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    return {"model": {"name_or_path": str(tmp_path / "base")}}


def other_text(text: Path, base: Path, tmp_path: Path) -> dict[str, Any]:
    """As many tokens; two of them have changed places."""
    changed = (text / "train_0.txt").read_text()
    (tmp_path / "train_0.txt").write_text(changed[:100] + changed[101] + changed[100] + changed[102:])
    shutil.copy(text / "train_1.txt", tmp_path)
    data = medusa_values(tmp_path, text, base)["data"]
    return {"data": data | {"train": [{"kind": "text", "files": [f"{tmp_path}/train_*.txt"]}]}}


def other_packing(text: Path, base: Path, tmp_path: Path) -> dict[str, Any]:
    return {"data": medusa_values(tmp_path, text, base)["data"] | {"documents": "joined"}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (other_weights, r"with other weights than '.*/base' has now \(the fingerprint differs\)"),
        (other_text, r"\((rows|data): "),
        (other_packing, r"documents: separate there, joined here"),
        ({"batch": {"sequences": 8, "length": 15}}, r"length: 16 there, 15 here"),
        ({"model": {"dtype": "bfloat16"}}, r"weights: float32 there, bfloat16 here"),
        ({"dtype": "bfloat16"}, r"dtype: float32 there, bfloat16 here"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_features_of_something_else_are_refused(
    changes: Any, expected: str, cached: Path, text: Path, base: Path, tmp_path: Path
) -> None:
    given = changes(text, base, tmp_path) if callable(changes) else changes
    recipe = recipe_of(tmp_path / "run", text, base, cache=text / "cache", **EPOCHS | given)
    with pytest.raises(UserError, match=rf"^features\.cache: .*{expected}.*; name another directory"):
        train(recipe)


def test_the_program_says_it_in_one_line(cached: Path, text: Path, base: Path, tmp_path: Path) -> None:
    kept = {"cache": str(text / "cache")}
    path = write_recipe(tmp_path / "recipe.yaml", medusa_values(tmp_path / "run", text, base, features=kept))
    process = start("-m", "train", str(path))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.splitlines()[-1].startswith("error: features.cache: ")
    assert "Traceback" not in error


def test_a_full_disk_is_told_before_anything_is_made(
    text: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: list[int]
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage(free=100_000))
    with pytest.raises(
        UserError, match=r"needs 0\.\d MB for \d+ rows, and 0\.1 MB are free; name a directory"
    ):
        train(recipe_of(tmp_path / "run", text, base, cache=tmp_path / "cache", **EPOCHS))
    assert forwards == []


def test_two_runs_do_not_fill_one_cache_at_once(text: Path, base: Path, tmp_path: Path) -> None:
    with (
        FeatureFiles(tmp_path / "cache" / "train").alone(),
        pytest.raises(UserError, match=r"another run fills .* now"),
    ):
        train(recipe_of(tmp_path / "run", text, base, cache=tmp_path / "cache"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"objective": {"kind": "medusa", "stage": "joint", "init_heads": "x"}},
            r"this objective trains it; leave the section out",
        ),
        ({"objective": {"kind": "layerskip"}, "model": small_values()["model"]}, r"this objective trains it"),
        (
            {
                "data": {
                    "train": [{"kind": "text", "files": ["x"], "streaming": True}],
                    "heldout": [{"kind": "text", "files": ["y"]}],
                }
            },
            r"a source has streaming: true, and only rows on disk have features",
        ),
        ({"features": {"cache": "x", "dtype": "float16"}}, r"features\.dtype: 'float16' is not valid"),
        ({"features": {"dtype": "float32"}}, r"features\.cache: missing"),
    ],
)
def test_what_has_no_features_is_refused(changes: dict[str, Any], expected: str) -> None:
    values = small_values(objective={"kind": "medusa"}, model={"name_or_path": "x"}, features={"cache": "x"})
    with pytest.raises(UserError, match=expected):
        parse_recipe(values | changes)


def test_a_step_costs_what_the_heads_cost(base: Path, text: Path, tmp_path: Path) -> None:
    """As the FLOPs utilisation has it: the model's forward is not part of a step any more."""
    objective = Medusa.build(parse_recipe(medusa_values(tmp_path, text, base)), tiny_model())
    online, of_model = objective.step_flops(0, 8, 16), objective.flops_of({}, 8, 16)
    objective.has_features = True
    assert objective.step_flops(0, 8, 16) == online - of_model > 0.0


def test_the_dry_run_knows_the_size(
    text: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from train.dry_run import dry_run

    def shown(**changes: Any) -> str:
        recipe = recipe_of(tmp_path / "run", text, base, cache=Path("there"), **changes)
        dry_run(recipe, 1, Console(width=400, highlight=False))
        return capsys.readouterr().out

    bfloat16 = shown(dtype="bfloat16", max_steps=5000)
    assert "features in there: 64 bytes a token; at most 41.0 MB to train on" in bfloat16
    epochs = shown(max_steps=None, epochs=2.0)
    assert "features in there: 128 bytes a token, 128.0 MB a million; how many there are only" in epochs
    assert not (tmp_path / "run").exists()
    assert not Path("there").exists()
