from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.plots import _spread, plot_exits, to_svg, training_figure
from eval.results import TrainingPoint
from tests.eval.samples import EXITS


def test_plot_exits_writes_an_image(tmp_path: Path) -> None:
    for name, magic in (("exits.png", b"\x89PNG"), ("exits.svg", b"<?xml")):
        plot_exits(EXITS, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(magic)


def test_a_diverged_run_still_has_its_figure() -> None:
    nowhere = TrainingPoint(step=0, loss=float("nan"), tokens=0, heldout={2: float("nan")})
    partly = TrainingPoint(step=5, loss=1.0, tokens=9, heldout={2: float("inf"), 4: 2.0})
    assert "<svg" in to_svg(training_figure([nowhere]))
    assert "<svg" in to_svg(training_figure([nowhere, partly]))


def test_labels_are_spread_with_least_movement() -> None:
    assert _spread([3.0, 1.0, 2.0], 0.5) == pytest.approx([3.0, 1.0, 2.0])
    assert _spread([1.0, 1.0, 9.0], 1.0) == pytest.approx([0.5, 1.5, 9.0])
    generator = np.random.default_rng(0)
    values = list(generator.uniform(0, 3, size=8))
    assert np.all(np.diff(sorted(_spread(values, 0.6))) >= 0.6 - 1e-9)
