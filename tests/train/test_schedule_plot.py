"""The small plots of what changes over a run."""

from __future__ import annotations

from train.schedule_plot import COLUMNS, PLAIN_SHADES, heatmap, rotates


def test_rows_are_layers_and_columns_are_means_over_steps() -> None:
    lines = heatmap(lambda step: [0.0, step % 2, 1.0], range(100, 100 + 2 * COLUMNS), shades=PLAIN_SHADES)
    assert lines[0] == f"    1 |{' ' * COLUMNS}|"
    assert lines[1] == f"    2 |{':' * COLUMNS}|".replace(":", PLAIN_SHADES[3])  # half of the largest
    assert lines[2] == f"    3 |{'#' * COLUMNS}|"
    assert lines[3].split() == ["step", "100", "to", "219", "darkest:", "1"]
    assert {len(line) for line in lines[:3]} == {COLUMNS + 8}


def test_what_is_more_than_zero_is_seen_and_a_short_run_is_short() -> None:
    lines = heatmap(lambda step: [1e-6, 5.0], range(3), shades=PLAIN_SHADES)
    assert lines[:2] == ["    1 |...|", "    2 |###|"]
    assert heatmap(lambda step: [0.0], range(2), shades=PLAIN_SHADES)[0] == "    1 |  |"


def test_a_handful_of_many_layers_first_and_last_among_them() -> None:
    lines = heatmap(lambda step: [float(layer % 2) for layer in range(80)], range(10), shades=PLAIN_SHADES)
    shown = [int(line.split("|")[0]) for line in lines[:-1]]
    assert shown[0] == 1
    assert shown[-1] == 80
    assert len(shown) == 12
    assert {line.split("|")[1] for line in lines[:-1]} == {" " * 10, "#" * 10}  # every other one is not all


def test_what_rotates_and_what_only_grows() -> None:
    assert rotates(lambda step: [1.0, float(step % 39 == 0)], range(1000))
    assert not rotates(lambda step: [1.0, float(step > 30)], range(1000))  # switched on once
    assert not rotates(lambda step: [step / 1000.0, 0.0], range(1000))
