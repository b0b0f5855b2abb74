"""Every bad recipe gives one line that names the key, the value and what would be valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerskip_model.errors import UserError
from tests.train.small_recipe import small_values
from train.config import Recipe, load_recipe, parse_recipe
from train.data.sources import DataConfig

DELETE = object()
TWO_ORIGINS = "model: give exactly one of config (a new model) and name_or_path (an existing one)"


def dotted(key: str) -> str:
    """'__' stands for '.', and two long sections have short names."""
    first, *rest = key.split("__")
    short = {"exit": "objective.early_exit", "dropout": "objective.layer_dropout"}
    return ".".join([short.get(first, first), *rest])


def changed(**changes: Any) -> dict[str, Any]:
    """A valid recipe with values at keys of `dotted` replaced."""
    values = small_values()
    for key, value in changes.items():
        *path, last = dotted(key).split(".")
        place: Any = values
        for part in path:
            place = place[int(part)] if part.isdigit() else place[part]
        if value is DELETE:
            del place[last]
        else:
            place[int(last) if last.isdigit() else last] = value
    return values


def message_of(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(values, origin="r.yaml")
    message = str(caught.value)
    assert message.startswith("r.yaml: ")
    assert "\n" not in message
    return message.removeprefix("r.yaml: ")


def test_the_recipe_that_the_others_change_is_valid() -> None:
    assert isinstance(parse_recipe(changed()), Recipe)


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("optimizr", {"lr": 1}, "optimizer"),
        ("batch__lenght", 3, "length"),
        ("model__tokeniser", {}, "tokenizer"),
        ("model__tokenizer__train__vocab", 300, "vocab_size"),
        ("data__heldot", 0.1, "heldout"),
        ("optimizer__learning_rate", 0.1, "lr"),
        ("optimizer__beta", [0.9, 0.9], "betas"),
        ("optimizer", {"kind": "muon", "lr": 1.0, "adamw_lr": 1.0, "momentun": 0.9}, "momentum"),
        ("objective__layer_drop", {}, "layer_dropout"),
        ("dropout__pmax", 0.1, "p_max"),
        ("exit__curiculum", "none", "curriculum"),
        ("schedule__warmup", 3, "warmup_steps"),
        ("log__wandb", {"project": "x", "modus": "offline"}, "mode"),
        ("log__evry", 3, "every"),
        ("checkpoint", {"keep_last": 3}, "keep"),
        ("evaluate", {"sequence": 3}, "sequences"),
    ],
)
def test_unknown_keys_name_the_nearest(key: str, value: Any, nearest: str | None) -> None:
    message = message_of(changed(**{key: value}))
    name = dotted(key)
    if isinstance(value, dict) and nearest not in (None, "optimizer", "layer_dropout", "tokenizer"):
        name, value = f"{name}.{list(value)[-1]}", list(value.values())[-1]
    assert message.startswith(f"{name}: unknown key (value {value!r});")
    assert " valid: " in message
    assert ("did you mean" in message) == (nearest is not None)
    assert nearest is None or f" did you mean '{nearest}'? valid: " in message


def test_unknown_keys_inside_lists_and_kinds() -> None:
    message = message_of(changed(data__train__0={"kind": "text", "fils": ["x"]}))
    # The misspelt key is told before the missing one, with the keys of this kind only.
    valid = "kind, skip, limit, weight, streaming, files (and 1 more)"
    assert message == f"data.train.0.fils: unknown key (value ['x']); did you mean 'files'? valid: {valid}"
    message = message_of(changed(data__heldout=[{"kind": "jsonl", "files": ["x"], "fields": "text"}]))
    assert message.startswith("data.heldout.0.fields: unknown key (value 'text'); did you mean 'field")
    message = message_of(changed(optimizer={"kind": "adamw", "lr": 1.0, "momentum": 0.9}))
    assert message.endswith("valid: kind, lr, betas, eps, weight_decay, clip_norm")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("output_dir", 3, "output_dir: must be text in quotes, got 3"),
        ("output_dir", "", "output_dir: must have at least 1 character, got ''"),
        ("seed", 1.0, "seed: must be a whole number, got 1.0"),
        ("seed", -1, "seed: must be greater than or equal to 0, got -1"),
        ("seed", True, "seed: must be a whole number, got True"),
        ("max_steps", "10", "max_steps: must be a whole number, got '10'"),
        ("batch", None, "batch: must be a mapping of keys to values, got None"),
        ("batch__sequences", 0, "batch.sequences: must be greater than or equal to 1, got 0"),
        ("optimizer__lr", "1e-3", "optimizer.lr: must be a number, got '1e-3'"),
        ("optimizer__lr", float("inf"), "optimizer.lr: must be a finite number, got inf"),
        ("optimizer__lr", float("nan"), "optimizer.lr: must be a finite number, got nan"),
        ("optimizer__betas", [0.9], "optimizer.betas: needs at least 2 entries, got [0.9]"),
        ("optimizer__betas", [0.9] * 3, "optimizer.betas: takes at most 2 entries, got [0.9, 0.9, 0.9]"),
        ("optimizer__betas", [0.9, 1.5], "optimizer.betas.1: must be less than 1, got 1.5"),
        ("optimizer", "muon", "optimizer: must be a mapping of keys to values, got 'muon'"),
        ("objective", "layerskip", "objective: must be a mapping of keys to values, got 'layerskip'"),
        ("dropout__p_max", 1.0, "objective.layer_dropout.p_max: must be less than 1, got 1.0"),
        ("exit__exits", [0], "objective.early_exit.exits.0: must be greater than or equal to 1, got 0"),
        ("exit__exits", ["two"], "objective.early_exit.exits.0: must be a whole number, got 'two'"),
        ("data__train", [], "data.train: needs at least 1 entries, got []"),
        ("data__train", {"kind": "text"}, "data.train: must be a list, got {'kind': 'text'}"),
        ("data__train__0", "text", "data.train.0: must be a mapping of keys to values, got 'text'"),
        ("data__heldout", 0.7, "data.heldout: must be less than 0.5, got 0.7"),
        ("data__heldout", "some", "data.heldout: must be a number, got 'some'"),
        ("model__config", "llama", "model.config: must be a mapping of keys to values, got 'llama'"),
        ("model__activation_checkpointing", "yes", "model.activation_checkpointing: must be true or false, got 'yes'"),
    ],
)  # fmt: skip
def test_wrong_types_and_values(key: str, value: Any, expected: str) -> None:
    assert message_of(changed(**{key: value})) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("objective__kind", "layerskp", "objective.kind: 'layerskp' is not a method; did you mean 'layerskip'?"),
        ("objective__kind", ["layerskip"], "objective.kind: ['layerskip'] is not a method; did you mean 'layerskip'?"),
        ("objective__kind", DELETE, "objective.kind: None is not a method; valid: "),
        ("optimizer__kind", "adam", "optimizer.kind: 'adam' is not valid; did you mean 'adamw'? valid: adamw, adamw_8"),
        ("optimizer__kind", DELETE, "optimizer: needs a key 'kind', got {"),
        ("data__train__0__kind", "txt", "data.train.0.kind: 'txt' is not valid; did you mean 'text'? valid: stdlib, "),
        ("data__heldout", [{"kind": "stdlb"}], "data.heldout.0.kind: 'stdlb' is not valid; did you mean 'stdlib'?"),
        ("schedule__kind", "cos", "schedule.kind: 'cos' is not valid; did you mean 'cosine'? valid: cosine, linear, "),
        ("schedule__kind", 3, "schedule.kind: 3 is not valid; valid: cosine, linear, constant"),
        ("model__dtype", "bf16", "model.dtype: 'bf16' is not valid; did you mean 'bfloat16'? valid: float32, bfloat16"),
        ("exit__exits", "al", "objective.early_exit.exits: 'al' is not valid; did you mean 'all'? valid: all, a list"),
        ("exit__weights", "summ", "objective.early_exit.weights: 'summ' is not valid; did you mean 'sum'? valid: "),
        ("dropout__over_depth", "expo", "objective.layer_dropout.over_depth: 'expo' is not valid; did you mean 'exp'?"),
        ("log__wandb", {"project": "x", "mode": False}, "log.wandb.mode: False is not valid; valid: online, offline"),
    ],
)  # fmt: skip
def test_bad_names(key: str, value: Any, expected: str) -> None:
    assert message_of(changed(**{key: value})).startswith(expected)


@pytest.mark.parametrize(
    "key",
    [
        *("output_dir", "batch", "batch__length", "model", "data", "data__train", "data__train__0__files"),
        *("objective", "dropout__p_max", "optimizer", "optimizer__lr"),
    ],
)
def test_missing_keys(key: str) -> None:
    assert message_of(changed(**{key: DELETE})) == f"{dotted(key)}: missing; it has no default"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_tokens": 9}, "give exactly one of max_steps, max_tokens and epochs, not max_steps: 4, max_tokens: 9"),
        ({"max_steps": None}, "give exactly one of max_steps, max_tokens and epochs, not none"),
        ({"schedule__warmup_steps": 5}, "schedule.warmup_steps: 5 is more than the 4 steps of the run"),
        (
            {"max_steps": None, "max_tokens": 129, "schedule__warmup_steps": 3},
            "schedule.warmup_steps: 3 is more than the 2 steps of the run",
        ),
        ({"batch__micro": 9}, "batch.micro: 9 is more than sequences: 8"),
        ({"batch__length": 33}, "batch.length: 33 is more than model.config.max_position_embeddings: 32"),
        (
            {"model__config__vocab_size": 279},
            "model.config.vocab_size: 279 is less than tokenizer.train.vocab_size: 280; leave the first one out",
        ),
        ({"model__config": None}, TWO_ORIGINS),
        ({"model__name_or_path": "x"}, TWO_ORIGINS),
        ({"model__config__model_type": None}, "model: config needs a model_type, for example 'llama'"),
        (
            {"model__tokenizer": None},
            "model: a new model (config) needs tokenizer: {train: {vocab_size: N}} or {name_or_path: ...}",
        ),
        ({"model__tokenizer": {}}, "model.tokenizer: give exactly one of 'train' and 'name_or_path'"),
        ({"model__dtype": "bfloat16"}, "model.dtype: bfloat16 is for weights that are loaded; a new model is float32"),
        (
            {"model": {"name_or_path": "x", "dtype": "bfloat16"}},
            "model.dtype: bfloat16 is for frozen weights, and this objective trains them; use float32 "
            "(model.autocast: bfloat16 makes it fast) or model.lora",
        ),
        (
            {"model__lora": {"rank": 4}, "optimizer": {"kind": "muon", "lr": 0.02, "adamw_lr": 0.001}},
            "optimizer.kind: muon orthogonalises the update of a whole matrix, and model.lora trains only factors of "
            "one; use adamw",
        ),
        ({"exit__curriculum": "none"}, "objective.early_exit.every: 2 needs curriculum: rotational, not none"),
    ],
)  # fmt: skip
def test_impossible_combinations(changes: dict[str, Any], expected: str) -> None:
    assert message_of(changed(**changes)) == expected


def test_the_last_possible_values_are_taken() -> None:
    parse_recipe(
        changed(schedule__warmup_steps=4, batch__micro=8, batch__length=32, model__config__vocab_size=280)
    )


def test_the_first_of_many_mistakes_still_helps() -> None:
    message = message_of(changed(seed=-1, batch__lenght=3, optimizer__kind="adam"))
    assert message.startswith("batch.lenght: unknown key (value 3); did you mean 'length'?")
    assert message.endswith(" (and 2 more)")


def test_long_values_are_cut() -> None:
    assert len(message_of(changed(seed="x" * 10_000))) < 200


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("all")
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, part in inner for place in places(part, (*path, key))]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(places(changed())), anything)
def test_any_value_in_any_place_gives_a_recipe_or_one_line(place: tuple[Any, ...], value: Any) -> None:
    values = changed()
    inner: Any = values
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    try:
        parse_recipe(values)
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert str(place[0]) in message or value is None  # the key, except where another is missing now
        assert len(message) < 500


FILES = [
    ("", "is empty"),
    ("# only a comment\n", "is empty"),
    ("- a\n- b\n", "must be a mapping of keys to values"),
    ("3\n", "must be a mapping of keys to values"),
    ("a: [1\n", "not valid YAML (line 2: did not find expected ',' or ']')"),
    ("a:\n\t- b\n", "not valid YAML (line 2: found character that cannot start any token)"),
    ("seed: 1\nseed: 2\n", "not valid YAML (line 2: found duplicate key seed)"),
    ("seed: ${sede}\n", "seed: Interpolation key 'sede' not found"),
    ("seed: ${\n", "not valid YAML (seed: no viable alternative at input '${')"),
    ("seed: ???\n", "seed: Missing mandatory value: seed"),
    ("seed: !!python/object:os.system 1\n", "not valid YAML (line 1: could not determine a constructor"),
    ("\0", "not valid YAML (unacceptable character"),
]


@pytest.mark.parametrize(("text", "expected"), FILES)
def test_bad_files(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"recipe {path}: {expected}")
    assert "\n" not in str(caught.value)


def test_missing_files_directories_and_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "right.yaml").write_bytes(b"a: \xff")
    with pytest.raises(UserError, match=r"wrong\.yaml: no such file; there is .*right\.yaml$"):
        load_recipe(tmp_path / "wrong.yaml")
    with pytest.raises(UserError, match="is a directory; name a YAML file in it"):
        load_recipe(tmp_path)
    with pytest.raises(UserError, match=r"right\.yaml: cannot be read \('utf-8' codec can't decode"):
        load_recipe(tmp_path / "right.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr", "override 'optimizer.lr': write it as key=value, for example optimizer.lr=0.01"),
        ("=3", "override '=3': write it as key=value"),
        ("optimizer..lr=3", "override 'optimizer..lr=3': write it as key=value"),
        ("optimizer.lr=[1", "override 'optimizer.lr=[1': line 2: did not find expected ',' or ']'"),
        (
            "data.train.4.kind=text",
            "override 'data.train.4.kind=text': data.train[4]: list index out of range",
        ),
        ("data.train.x=text", "override 'data.train.x=text': "),
        ("optimizer.lr=abc", "PATH: optimizer.lr: must be a number, got 'abc'"),
        ("optimizer.lr=", "PATH: optimizer.lr: must be a number, got None"),
        ("optimizer.lr.x=3", "PATH: optimizer.lr: must be a number, got {'x': 3}"),
        ("optimizr.lr=3", "PATH: optimizr: unknown key (value {'lr': 3}); did you mean 'optimizer'?"),
        ("optimizer.lr=${nope}", "recipe PATH: optimizer.lr: Interpolation key 'nope' not found"),
    ],
)
def test_bad_overrides(recipe_file: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, [override])
    assert str(caught.value).startswith(expected.replace("PATH", str(recipe_file)))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(yaml.safe_dump(changed()))
    return path


def test_the_union_of_a_number_and_sections_names_the_user_s_key() -> None:
    assert DataConfig.model_fields["heldout"].default == 0.05
    assert message_of(changed(data__heldout=[])) == "data.heldout: needs at least 1 entries, got []"
