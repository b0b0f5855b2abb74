"""The rates and decisions of layer dropout against the equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from layerskip_model.layer_dropout import SHAPES, LayerDropout, layer_slice, uniform_hash


def dropout(**changes: object) -> LayerDropout:
    settings: dict[str, object] = {
        "p_max": 0.5,
        "over_depth": "exp",
        "over_time": "constant",
        "layers": "all",
        "num_layers": 6,
        "total_steps": 50,
        "seed": 3,
    }
    return LayerDropout(**(settings | changes))  # type: ignore[arg-type]


# --- the rates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_scratch", [False, True])
def test_rates_are_the_papers(from_scratch: bool) -> None:
    """p_{l,t} = S(t) D(l) p_max with D(l) = exp(l ln2 / (L-1)) - 1 and S(t) = exp(t ln2 / (T-1)) - 1, or 1."""
    L, T, p_max = 12, 40, 0.2
    part = dropout(p_max=p_max, num_layers=L, total_steps=T, over_time="exp" if from_scratch else "constant")
    for t in range(T):
        S = math.exp(t * math.log(2) / (T - 1)) - 1 if from_scratch else 1.0
        for layer in range(L):
            D = math.exp(layer * math.log(2) / (L - 1)) - 1
            assert part.rates(t)[layer] == pytest.approx(S * D * p_max, abs=1e-15)
    assert part.rates(T - 1)[0] == 0.0
    assert part.rates(T - 1)[-1] == pytest.approx(p_max)


@pytest.mark.parametrize(
    ("shape", "middle"),
    [
        ("exp", math.sqrt(2) - 1),
        ("linear", 0.5),
        ("log", math.log2(1.5)),
        ("sine", math.sin(math.pi / 4)),
        ("sigmoid", 0.5),
        ("saturating", 1 - math.exp(-50)),
        ("constant", 1.0),
    ],
)
def test_shapes_by_name_over_depth_and_over_time(shape: str, middle: float) -> None:
    over_depth = dropout(over_depth=shape, num_layers=5, p_max=0.4).rates(0)
    assert over_depth[2] == pytest.approx(0.4 * middle)
    assert over_depth == sorted(over_depth)
    over_time = [dropout(over_time=shape, total_steps=5, p_max=0.4).rates(step)[-1] for step in range(5)]
    assert over_time[2] == pytest.approx(0.4 * middle)
    assert over_time[4] == pytest.approx(0.4, rel=0.01)  # the sigmoid ends at 0.993


def test_every_shape_has_a_twin_above_and_stays_a_rate() -> None:
    assert set(SHAPES) == {"exp", "linear", "log", "sine", "sigmoid", "saturating", "constant"}
    for shape in SHAPES:
        rates = dropout(over_depth=shape, over_time=shape, p_max=0.99, num_layers=30).rates(49)
        assert all(0.0 <= rate <= 0.99 + 1e-12 for rate in rates)


def test_one_layer_and_one_step_are_no_special_case() -> None:
    assert dropout(num_layers=1, total_steps=1, over_time="exp").rates(0) == [0.0]


def test_layerdrop_is_a_recipe() -> None:
    """A constant rate on every other layer (1909.11556)."""
    rates = dropout(p_max=0.2, over_depth="constant", layers="1::2").rates(0)
    assert rates == [0.0, 0.2, 0.0, 0.2, 0.0, 0.2]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("1::2", [1, 3, 5]),
        ("2:4", [2, 3]),
        (":-1", [0, 1, 2, 3, 4]),
        (" -2 : ", [4, 5]),
    ],
)
def test_layer_slices(text: str, chosen: list[int]) -> None:
    assert list(layer_slice(text, 6)) == chosen


@pytest.mark.parametrize("text", ["", "3", "odd", "a:b", "1:2:3:4", "::0", "1.5:"])
def test_what_is_no_layer_slice_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="neither 'all' nor a slice"):
        layer_slice(text, 6)


# --- the decisions -----------------------------------------------------------------------------------------


def naive_hash(*keys: int) -> float:
    """SplitMix64 over the keys in turn, on Python's integers."""
    mask, state = 2**64 - 1, 0
    for key in keys:
        state = ((state ^ key) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return (state >> 11) / 2**53


def test_decisions_are_a_hash_of_seed_step_row_and_layer() -> None:
    part = dropout(seed=2**63, over_depth="linear")
    rows = [5, 0, 2**40]
    kept = part.kept(7, rows)
    assert kept.shape == (6, 3)
    for layer in range(6):
        for column, row in enumerate(rows):
            assert kept[layer, column] == (naive_hash(2**63, 7, row, layer) >= 0.5 * layer / 5)


def test_decisions_do_not_depend_on_how_the_batch_is_split() -> None:
    part = dropout(p_max=0.9)
    whole = part.kept(11, range(7))
    for cuts in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 7], [0, 2, 4, 6, 7]):
        parts = [part.kept(11, range(begin, end)) for begin, end in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    np.testing.assert_array_equal(part.kept(11, [6, 3]), whole[:, [6, 3]])
    np.testing.assert_array_equal(part.kept(11, torch.arange(7).tolist()), whole)


def test_mean_rate_of_every_layer_is_within_binomial_bounds() -> None:
    part = dropout(p_max=0.3, num_layers=8)
    steps, rows = 200, 64
    kept = np.stack([part.kept(step, range(rows)) for step in range(steps)])  # [steps, layers, rows]
    rates = part.rates(0)
    for layer in range(8):
        draws = steps * rows
        deviation = math.sqrt(rates[layer] * (1 - rates[layer]) / draws)
        assert abs(1 - kept[:, layer].mean() - rates[layer]) <= 4.5 * deviation
        per_step = (~kept[:, layer]).sum(axis=1)  # its spread too, not only its mean
        expected = rows * rates[layer] * (1 - rates[layer])
        assert per_step.var() == pytest.approx(expected, rel=0.45)


NEIGHBOURS: dict[str, Callable[..., tuple[Any, Any, Any, Any]]] = {
    "next step": lambda seed, step, row, layer: (seed, step + 1, row, layer),
    "next row": lambda seed, step, row, layer: (seed, step, row + 1, layer),
    "next layer": lambda seed, step, row, layer: (seed, step, row, layer + 1),
    "next seed": lambda seed, step, row, layer: (seed + 1, step, row, layer),
    "next step and layer": lambda seed, step, row, layer: (seed, step + 1, row, layer + 1),
    "seed and step changed alike": lambda seed, step, row, layer: (seed ^ 1, step ^ 1, row, layer),
    "row and step changed alike": lambda seed, step, row, layer: (seed, step ^ 1, row ^ np.uint64(1), layer),
    "row and layer swapped": lambda seed, step, row, layer: (seed, step, layer + 100, row),
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_draws_of_neighbours_are_uncorrelated(neighbour: str) -> None:
    """Also where two keys change so that a careless mixture of them stays the same."""
    rows, layers = np.arange(64, dtype=np.uint64)[None, :], np.arange(24, dtype=np.uint64)[:, None]
    here, there = [], []
    for seed in (0, 1, 40):
        for step in range(12):
            other = NEIGHBOURS[neighbour](seed, step, rows, layers)
            here.append(uniform_hash(seed, step, rows, layers))
            there.append(uniform_hash(*other))
    x, y = np.concatenate(here).ravel(), np.concatenate(there).ravel()
    assert x.mean() == pytest.approx(0.5, abs=4.5 * math.sqrt(1 / 12 / len(x)))
    assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / math.sqrt(len(x))
    both = ((x < 0.2) & (y < 0.2)).mean()
    assert both == pytest.approx(0.04, abs=4.5 * math.sqrt(0.04 * 0.96 / len(x)))
