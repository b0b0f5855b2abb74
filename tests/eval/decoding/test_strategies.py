"""Names and settings of strategies, and one-line errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from eval.decoding.strategies import STRATEGIES, make_drafter, strategy_name
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.tiny_models import tiny_model

RUNNER = Runner(tiny_model())


def test_settings_can_be_inspected() -> None:
    drafter = make_drafter("self_speculative", RUNNER, exit_layer=2, num_speculations=3)
    given = {"exit_layer": 2, "num_speculations": 3}
    assert dataclasses.asdict(drafter.settings).items() >= given.items()
    assert (drafter.max_nodes, drafter.depth) == (4, 4)
    assert make_drafter("autoregressive", RUNNER, exit_layer=3).depth == 3
    assert make_drafter("greedy", RUNNER, exit_layer=None).depth == 4
    assert strategy_name("greedy") == "autoregressive"
    for strategy in STRATEGIES.values():
        assert strategy.Settings.__dataclass_params__.frozen


def test_settings_are_those_in_force() -> None:
    """What a variant takes by default is in the report, and nothing of what was not asked for."""
    given = {"exit_layer": 1, "num_speculations": 3}
    variants: dict[str, dict[str, Any]] = {
        "tree": {"draft_tree": True},
        "stop": {"draft_stop": "confidence"},
        "plain": {},
    }
    made = {name: make_drafter("self_speculative", RUNNER, **given, **v) for name, v in variants.items()}
    named = ("tree_top_k", "tree_tokens", "stop_threshold")
    found = {name: [getattr(one.settings, key) for key in named] for name, one in made.items()}
    assert found == {"tree": [2, 5, None], "stop": [None, None, 0.5], "plain": [None, None, None]}
    wide = make_drafter("self_speculative", RUNNER, **given, draft_tree=True, tree_top_k=4)
    assert (wide.settings.tree_top_k, wide.settings.tree_tokens) == (4, 5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("self_speculativ", {}, "unknown strategy 'self_speculativ', did you mean 'self_speculative'?"),
        ("telepathy", {}, "unknown strategy 'telepathy'; there are autoregressive, self_speculative"),
        (
            "self_speculative",
            {"num_speculations": 2},
            "self_speculative needs exit_layer: a whole number from 1",
        ),
        ("self_speculative", {"exit_layer": 2}, "needs num_speculations: a whole number of 1 or more"),
        ("self_speculative", {"exit_layr": 2}, "no setting 'exit_layr', did you mean 'exit_layer'?"),
        ("self_speculative", {"exit_layer": 0}, "exit_layer=0 is not valid; give a whole number from 1 to 3"),
        ("self_speculative", {"exit_layer": -1}, "exit_layer=-1 is not valid"),
        ("self_speculative", {"exit_layer": 4}, "exit_layer=4 is not valid"),
        ("self_speculative", {"exit_layer": 5}, "exit_layer=5 is not valid"),
        ("self_speculative", {"exit_layer": None}, "exit_layer=None is not valid"),
        ("self_speculative", {"exit_layer": "2"}, "exit_layer='2' is not valid"),
        ("self_speculative", {"exit_layer": True}, "exit_layer=True is not valid"),
        ("self_speculative", {"exit_layer": 1, "num_speculations": 0}, "num_speculations=0 is not valid"),
        ("autoregressive", {"exit_layer": 5}, "exit_layer=5 is not valid; give a whole number from 1 to 4"),
        ("autoregressive", {"exit_layer": 0}, "exit_layer=0 is not valid"),
    ],
)
def test_mistakes_are_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_drafter(name, RUNNER, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_one_layer_has_no_exit() -> None:
    runner = Runner(tiny_model(num_hidden_layers=1))
    with pytest.raises(UserError, match="too few layers"):
        make_drafter("self_speculative", runner, exit_layer=1, num_speculations=1)
