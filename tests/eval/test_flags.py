"""Groups of flags: what typer makes of them, and that they and the strategies' settings belong together."""

from __future__ import annotations

import dataclasses
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
import typer

from eval.choosing import Choosing
from eval.decoding.strategies import STRATEGIES
from eval.flags import ChoosingFlags, Drafting, Loading, Prompts, given, with_flags
from layerskip_model.command_line import flag


def plain(kind: Any) -> Any:
    """int of int | None, and str of what a user names: a choice, a draft model."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    (kind,) = (member for member in members if member is not type(None))
    return kind if kind in (int, float, bool) else str


SETTINGS = [
    (name, setting, plain(kind))
    for name, strategy in STRATEGIES.items()
    for setting, kind in get_type_hints(strategy.Settings).items()
]
FLAGS = {name: plain(kind) for name, kind in get_type_hints(Drafting).items()}


@pytest.mark.parametrize(("strategy", "setting", "kind"), SETTINGS)
def test_every_setting_of_a_strategy_has_a_flag_of_its_type(strategy: str, setting: str, kind: type) -> None:
    assert FLAGS.get(setting) is kind


def test_every_flag_belongs_to_a_strategy() -> None:
    assert FLAGS.keys() == {setting for _, setting, _ in SETTINGS}


def test_every_way_of_choosing_has_a_flag() -> None:
    fields = {field.name for field in dataclasses.fields(Choosing)}
    assert fields - {"sample"} == {field.name for field in dataclasses.fields(ChoosingFlags)}


def called(*arguments: str) -> dict[str, Any]:
    """What a command with groups is given for these arguments."""
    found: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @with_flags
    def command(
        *,
        prompts: Prompts,
        drafting: Drafting,
        name: Annotated[list[str] | None, flag("name", "of the thing")] = None,
        choosing: ChoosingFlags,
    ) -> None:
        """What it does."""
        found.update(prompts=prompts, drafting=drafting, name=name, choosing=choosing)

    app(list(arguments), standalone_mode=False)
    assert command.__doc__ == "What it does."
    return found


def test_a_group_is_filled_from_its_flags() -> None:
    found = called("--max_steps", "5", "--exit-layer", "3", "--draft_tree", "--name", "a", "--name", "b")
    assert found["prompts"] == Prompts(max_steps=5)
    assert found["drafting"] == Drafting(exit_layer=3, draft_tree=True)
    assert (found["name"], found["choosing"]) == (["a", "b"], ChoosingFlags())
    assert given(found["drafting"]) == {"exit_layer": 3, "draft_tree": True}


def test_flags_that_are_not_given_are_defaults() -> None:
    found = called()
    assert found["drafting"] == Drafting()
    assert given(found["drafting"]) == {}
    assert given(found["choosing"]) == {"seed": 0}
    assert found["name"] is None


@pytest.mark.parametrize("group", [Loading, Drafting, ChoosingFlags, Prompts])
def test_both_spellings_of_every_flag(group: type) -> None:
    for name, hint in get_type_hints(group, include_extras=True).items():
        option = hint.__metadata__[0]
        assert {option.default, *option.param_decls} == {f"--{name}", f"--{name.replace('_', '-')}"}
        assert option.help
