"""The weights of the early-exit loss against the paper's equations."""

from __future__ import annotations

import math
from typing import Any

import pytest

from layerskip_model.early_exit import WEIGHTS
from tests.layerskip_model.small import exit_loss


def naive_e(layer: int, layers: int, e_scale: float) -> float:
    """e(l) = e_scale sum_{i=0..l} i for l < L-1, and e(L-1) = L-1 + e_scale sum_{i=0..L-2} i."""
    total = 0
    if layer < layers - 1:
        for i in range(layer + 1):
            total += i
        return e_scale * total
    for i in range(layers - 1):
        total += i
    return layers - 1 + e_scale * total


def naive_rotational(t: int, layer: int, layers: int, every: int) -> int:
    """C_rot,R: exit l is on when (l - t) mod R = 0, or l = L-1."""
    return 1 if (layer - t) % every == 0 or layer == layers - 1 else 0


def naive_gradual(t: int, layer: int, layers: int, steps: int) -> int:
    """C_grad: from layer L-1 down to layer 0, one more every T/(2L) steps."""
    switched_on = 1 + math.floor(t / (steps / (2 * layers)))
    return 1 if layer in list(reversed(range(layers)))[:switched_on] else 0


@pytest.mark.parametrize("e_scale", [0.0, 0.1, 0.2, 1.0])
@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "none"])
@pytest.mark.parametrize(("layers", "every"), [(2, 1), (6, 4), (12, 11), (24, 23)])
def test_weights_are_the_papers(layers: int, every: int, curriculum: str, e_scale: float) -> None:
    L, R, T = layers, every, 96  # T / 2L is whole or a half: no rounding at the switches
    part = exit_loss(
        num_layers=L,
        total_steps=T,
        exits=range(1, L + 1),
        e_scale=e_scale,
        curriculum=curriculum,
        every=R if curriculum == "rotational" else 1,
    )
    for t in range(T):
        C = {
            "rotational": [naive_rotational(t, layer, L, R) for layer in range(L)],
            "gradual": [naive_gradual(t, layer, L, T) for layer in range(L)],
            "none": [1] * L,
        }[curriculum]
        products = [C[layer] * naive_e(layer, L, e_scale) for layer in range(L)]
        expected = {
            layer + 1: product / sum(products) for layer, product in enumerate(products) if product > 0
        }
        actual = part.at(t)
        assert actual == pytest.approx(expected, abs=1e-15)
        assert sum(actual.values()) == pytest.approx(1.0)
        assert L in actual
        assert 1 not in actual or L == 1  # e(0) = 0
        if curriculum == "rotational":
            assert len(actual) <= math.ceil(L / R) + 1


def test_rotation_has_each_exit_once_in_r_steps() -> None:
    part = exit_loss(num_layers=12, exits=range(1, 13), curriculum="rotational", every=5)
    for begin in (0, 3, 35):
        turns = [exit_layer for step in range(begin, begin + 5) for exit_layer in part.at(step)]
        assert sorted(exit_layer for exit_layer in turns if exit_layer < 12) == list(range(2, 12))


def test_gradual_switches_on_downwards_and_has_all_from_half_time() -> None:
    part = exit_loss(total_steps=80, curriculum="gradual", weights="uniform")
    assert [min(part.at(step)) for step in (0, 9, 10, 19, 20, 29, 30, 79)] == [4, 4, 3, 3, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("uniform", lambda n: 1.0),
        ("linear", lambda n: n),
        ("sqrt", lambda n: n**0.5),
        ("inverse", lambda n: 1 / n),
        ("inverse_sqrt", lambda n: n**-0.5),
    ],
)
def test_other_weights_by_name(name: str, formula: Any) -> None:
    total = sum(formula(n) for n in range(1, 5))
    expected = {n: formula(n) / total for n in range(1, 5)}
    assert exit_loss(weights=name).at(3) == pytest.approx(expected)
    assert len(WEIGHTS) == 5


def test_named_exits_only() -> None:
    """LITE: chosen exits, uniform weights, the last layer always there."""
    assert exit_loss(exits=[1, 3], weights="uniform").at(0) == pytest.approx(dict.fromkeys((1, 3, 4), 1 / 3))
    assert exit_loss(exits=[], weights="uniform").at(0) == {4: 1.0}
    rotating = exit_loss(exits=[1, 3], weights="uniform", curriculum="rotational", every=2)
    assert [sorted(rotating.at(step)) for step in (0, 1)] == [[1, 3, 4], [4]]


def test_explicit_weights_are_shares_of_the_loss() -> None:
    assert exit_loss(exits=[3, 1], weights=[0.25, 0.5]).at(9) == pytest.approx({1: 0.5, 3: 0.25, 4: 0.25})
    gradual = exit_loss(exits=[3, 1], weights=[0.25, 0.5], curriculum="gradual")
    assert gradual.at(6) == pytest.approx({3: 0.5, 4: 0.5})  # normalised over those that are on
    assert gradual.at(39) == pytest.approx({1: 0.5, 3: 0.25, 4: 0.25})


def test_a_model_of_one_layer_has_its_one_loss() -> None:
    assert exit_loss(num_layers=1, exits=[1]).at(0) == {1: 1.0}
