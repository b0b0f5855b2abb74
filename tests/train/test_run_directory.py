from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerskip_model.errors import UserError
from tests.tiny_models import tiny_model
from tests.train.small_recipe import small_recipe, write_documents
from train import run_directory
from train.config import Recipe, parse_recipe
from train.preflight import check_inputs
from train.run_directory import claim, fingerprint, is_run, write_export, write_run_file

RESULTS = ("run.json", "heldout.jsonl", "log.jsonl", "export", "data", "checkpoints", "wandb")


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    (tmp_path / "text").mkdir()
    return write_documents(tmp_path / "text", 3)


@pytest.fixture
def recipe(text: list[str]) -> Recipe[Any]:
    return small_recipe(data={"train": [{"kind": "text", "files": text}]})


def changed(recipe: Recipe[Any], **changes: Any) -> Recipe[Any]:
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *path, last = key.split("__")
        place = values
        for part in path:
            place = place[part]
        place[last] = value
    return parse_recipe(values)


def finish(directory: Path) -> None:
    """Results of every sort, as a run leaves them."""
    for name in RESULTS:
        if "." in name:
            (directory / name).write_text("{}")
        else:
            (directory / name).mkdir()
            (directory / name / "file").write_text("x")


def listing(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in directory.rglob("*")}


def test_a_new_directory_gets_the_whole_recipe(tmp_path: Path, recipe: Recipe[Any]) -> None:
    directory = tmp_path / "deep" / "out"
    claim(directory, recipe, fresh=False)
    assert [path.name for path in directory.iterdir()] == ["recipe.yaml"]
    assert parse_recipe(yaml.safe_load((directory / "recipe.yaml").read_text())) == recipe
    assert is_run(directory)
    claim(directory, recipe, fresh=False)  # an interrupted run goes on
    claim(
        tmp_path / "text", recipe, fresh=False
    )  # somebody's directory, with files that a run has no names for
    assert len(list((tmp_path / "text").iterdir())) == 4


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("seed", 1, "seed: 0 there, 1 here"),
        ("optimizer__lr", 0.5, "optimizer.lr: 0.005 there, 0.5 here"),
        ("objective__early_exit__every", 3, "objective.early_exit.every: 2 there, 3 here"),
        ("objective__early_exit", None, "objective.early_exit: None there"),
        ("batch__sequences", 4, "batch.sequences: 8 there, 4 here"),
        ("max_steps", 5, "max_steps: 4 there, 5 here"),
        ("data__heldout", 0.3, "data.heldout: 0.05 there, 0.3 here"),
    ],
)
def test_another_recipe_is_refused_and_named(
    tmp_path: Path, recipe: Recipe[Any], key: str, value: Any, told: str
) -> None:
    claim(tmp_path / "out", recipe, fresh=False)
    before = listing(tmp_path)
    other = changed(recipe, **{key: value})
    with pytest.raises(UserError) as caught:
        claim(tmp_path / "out", other, fresh=False)
    assert told.split(" there")[0] in str(caught.value) or key == "objective__early_exit"
    assert "choose another output_dir, or pass --fresh" in str(caught.value)
    assert listing(tmp_path) == before
    claim(tmp_path / "out", other, fresh=True)
    assert parse_recipe(yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())) == other


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("log__every", 3), ("checkpoint__keep", 5), ("evaluate__every", 2), ("batch__micro", 2)),
        *(("model__activation_checkpointing", True), ("output_dir", "elsewhere")),
    ],
)
def test_what_changes_nothing_learnt_may_change(
    tmp_path: Path, recipe: Recipe[Any], key: str, value: Any
) -> None:
    claim(tmp_path / "out", recipe, fresh=False)
    claim(tmp_path / "out", changed(recipe, **{key: value}), fresh=False)


def test_fresh_deletes_a_run_and_nothing_else(tmp_path: Path, recipe: Recipe[Any]) -> None:
    out = tmp_path / "out"
    claim(out, recipe, fresh=False)
    finish(out)
    for leftover in (".export.partial", ".export.old"):
        (out / leftover).mkdir()
    (out / "notes.md").write_text("mine")
    (out / "plots").mkdir()
    (out / "plots" / "data").write_text("mine too")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "large.bin").write_text("kept")
    (out / "data" / "file").unlink()
    (out / "data").rmdir()
    (out / "data").symlink_to(tmp_path / "elsewhere")
    claim(out, recipe, fresh=True)
    assert {path.name for path in out.iterdir()} == {"recipe.yaml", "notes.md", "plots"}
    assert (out / "plots" / "data").read_text() == "mine too"
    assert (tmp_path / "elsewhere" / "large.bin").read_text() == "kept"


@pytest.mark.parametrize("name", ["recipe.yaml", *RESULTS])
@pytest.mark.parametrize("fresh", [False, True])
def test_files_that_are_not_a_run_s_are_neither_overwritten_nor_deleted(
    tmp_path: Path, recipe: Recipe[Any], name: str, fresh: bool
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if "." in name:
        (out / name).write_text("output_dir: out\n")  # a user may keep a recipe there
    else:
        (out / name).mkdir()
    before = listing(tmp_path)
    with pytest.raises(UserError, match=rf"out holds {name}, but no run; choose another output_dir"):
        claim(out, recipe, fresh=fresh)
    assert listing(tmp_path) == before


def test_a_finished_run_stays_as_it_is(tmp_path: Path, recipe: Recipe[Any], text: list[str]) -> None:
    out = tmp_path / "out"
    claim(out, recipe, fresh=False)
    finish(out)
    for path in (tmp_path / "text").iterdir():
        path.unlink()  # its data is not needed any more
    before = listing(tmp_path)
    claim(out, changed(recipe, log__every=3), fresh=False)
    assert listing(tmp_path) == before
    with pytest.raises(UserError, match="matches no file"):
        claim(out, recipe, fresh=True)
    assert listing(tmp_path) == before  # not deleted for a run that cannot start


def test_a_damaged_recipe_is_told(tmp_path: Path, recipe: Recipe[Any]) -> None:
    claim(tmp_path / "out", recipe, fresh=False)
    path = tmp_path / "out" / "recipe.yaml"
    for damage in ("a: [", "- 1", ""):
        path.write_text(run_directory.MARK + damage)
        with pytest.raises(UserError, match=r"recipe\.yaml is damaged.*--fresh") as caught:
            claim(tmp_path / "out", recipe, fresh=False)
        assert "\n" not in str(caught.value)
    claim(tmp_path / "out", recipe, fresh=True)
    assert yaml.safe_load(path.read_text())["seed"] == 0


def test_places_that_cannot_be_written(tmp_path: Path, recipe: Recipe[Any]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^output_dir: .*file is a file; name a directory$"):
        claim(tmp_path / "file", recipe, fresh=False)
    with pytest.raises(UserError, match=r"^output_dir: .*file/out cannot be written \(Not a directory\)$"):
        claim(tmp_path / "file" / "out", recipe, fresh=True)
    if Path("/proc").is_dir():
        with pytest.raises(UserError, match=r"^output_dir: /proc/nowhere/out cannot be written \("):
            claim(Path("/proc/nowhere/out"), recipe, fresh=False)


# --- what a recipe names is looked at before anything is written


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__train": [{"kind": "text", "files": ["missing-*.txt"]}]}, "data source 'missing-*.txt' "),
        ({"data__heldout": [{"kind": "jsonl", "files": ["missing.jsonl"]}]}, "data source 'missing.jsonl' "),
        ({"data__train": [{"kind": "text", "files": ["EMPTY"]}]}, "data source files ['EMPTY']: every "),
        ({"data__train": [{"kind": "jsonl", "files": ["BROKEN"]}]}, "BROKEN:1: not JSON ("),
        ({"data__train": [{"kind": "jsonl", "files": ["ROWS"], "field": "txt"}]}, "ROWS:1: no field 'txt'"),
        ({"model__config__hiden_size": 8}, "model.config.hiden_size: unknown key (value 8)"),
        ({"model__config__model_type": "lama"}, "model.config.model_type: 'lama'"),
        ({"model__config__num_attention_heads": 3}, "model.config: "),
        ({"model": {"name_or_path": "EMPTY"}}, "model.name_or_path: 'EMPTY' is no checkpoint"),
        ({"model__tokenizer": {"name_or_path": "EMPTY"}}, "tokenizer.name_or_path='EMPTY' cannot be loaded"),
        ({"objective__early_exit": {"exits": [1, 3]}}, "objective.early_exit.exits: 3 is not an early exit"),
    ],
)  # fmt: skip
def test_bad_inputs_leave_nothing_behind(
    tmp_path: Path, recipe: Recipe[Any], changes: dict[str, Any], expected: str
) -> None:
    places = {name: str(tmp_path / name.lower()) for name in ("EMPTY", "BROKEN", "ROWS")}
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "broken").write_text("{")
    (tmp_path / "rows").write_text('{"text": "a"}\n')

    def placed(value: Any) -> Any:
        text = json.dumps(value)
        for name, place in places.items():
            text = text.replace(name, place)
            expected_places[0] = expected_places[0].replace(name, place)
        return json.loads(text)

    expected_places = [expected]
    bad = changed(recipe, **placed(changes))
    before = listing(tmp_path)
    with pytest.raises(UserError) as caught:
        claim(tmp_path / "out", bad, fresh=False)
    assert str(caught.value).startswith(expected_places[0])
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == before


def test_a_tokenizer_larger_than_the_model_is_told_before_the_weights_are_read(
    tmp_path: Path, recipe: Recipe[Any]
) -> None:
    from train.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["some words"], 300)
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model(vocab_size=len(tokenizer) - 1).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    model = {"name_or_path": str(tmp_path / "model")}
    with pytest.raises(
        UserError, match=r"^model\.config\.vocab_size: \d+ is less than the tokenizer's \d+ tokens"
    ):
        check_inputs(changed(recipe, model=model))
    tiny_model(vocab_size=len(tokenizer)).config.save_pretrained(tmp_path / "model")
    check_inputs(changed(recipe, model=model))
    with pytest.raises(UserError, match=r"^batch\.length: 129 is more than the model's context of 128"):
        check_inputs(changed(recipe, model=model, batch__length=129))


def test_wandb_must_be_installed_where_it_is_asked_for(
    recipe: Recipe[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from train import preflight

    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    check_inputs(recipe)
    with pytest.raises(
        UserError, match=r"^log\.wandb: the wandb package is not installed; pip install wandb"
    ):
        check_inputs(changed(recipe, log__wandb={"project": "x"}))


# --- what a run leaves


def test_an_export_appears_whole(tmp_path: Path) -> None:
    for content in ("first", "second"):
        path = write_export(tmp_path, lambda place, text=content: (place / "file").write_text(text))
        assert (path / "file").read_text() == content

    def fails(place: Path) -> None:
        (place / "file").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_export(tmp_path, fails)
    assert (tmp_path / "export" / "file").read_text() == "second"


def test_run_json_says_what_evaluation_needs(tmp_path: Path, recipe: Recipe[Any]) -> None:
    write_export(tmp_path, lambda place: (place / "model.safetensors").write_bytes(b"weights"))
    suggestion = {"strategy": "self_speculative", "settings": {"exit_layer": 1}}
    heldout = {"loss": 1.5}
    write_run_file(
        tmp_path, recipe, suggestion=suggestion, heldout=heldout, progress={"steps": 4, "tokens": 512}
    )
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["suggested"] == suggestion
    assert content["heldout_metrics"] == heldout
    assert content["training"] == {"steps": 4, "tokens": 512}
    assert (content["base"], content["heads"], content["recipe"]) == ("export", None, "recipe.yaml")
    assert {"python", "torch", "transformers"} <= content["versions"].keys()
    assert content["fingerprint"] == fingerprint(tmp_path / "export")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "text") == ["export", "run.json"]


def test_a_fingerprint_is_of_the_weights(tmp_path: Path) -> None:
    command = "import hashlib, sys; print(hashlib.sha256(b'onetwo').hexdigest())"
    expected = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    ).stdout
    for name, content in (("b.safetensors", b"two"), ("a.safetensors", b"one"), ("config.json", b"{}")):
        (tmp_path / name).write_bytes(content)
    assert fingerprint(tmp_path) == expected.strip()
