"""Which exit should draft, and how many tokens: the choice that run.json suggests."""

from __future__ import annotations

import re
from typing import Any

from eval.replay import OwnText, mean_accepted
from eval.statistics import best_self_speculation_settings

MAX_DRAFTS = 12
COST_PER_ROW = 0.05
"""Time of one more row in a verification, over that of a pass of one row: what two CPU cores showed for up to
32 rows of a 12 x 192 model (5.4 ms for 8 rows, 3.8 for 1). A GPU is kinder, which favours longer drafts."""


def suggested_self_speculation(
    num_layers: int, heldout: dict[str, float], written: OwnText | None, fixed: dict[str, int]
) -> dict[str, Any]:
    """The exit and number of drafts with the best predicted speedup, as `Objective.suggestion` gives it.

    By what would have been accepted in text that the model wrote, exactly; without such text by the acceptance on
    held-out text, for those numbers of drafts that were measured. `fixed` may hold either setting.
    """
    if num_layers == 1:
        return {"strategy": "autoregressive", "settings": {}, "predicted_speedup": 1.0}
    accepted = _on(heldout) if written is None else _in(written, fixed.get("num_speculations"))
    exits = [fixed["exit_layer"]] if "exit_layer" in fixed else range(1, num_layers)
    best = best_self_speculation_settings(
        {key: mean for key, mean in accepted.items() if key[0] in exits},
        num_layers,
        verify_cost_of_rows=lambda rows: 1.0 + COST_PER_ROW * (rows - 1),
    )
    settings = {"exit_layer": best.exit_layer, "num_speculations": best.num_speculations}
    return {"strategy": "self_speculative", "settings": settings, "predicted_speedup": best.predicted_speedup}


def _in(written: OwnText, drafts: int | None) -> dict[tuple[int, int], float]:
    """(exit, drafts) -> the drafts accepted a round in text that the model wrote."""
    choice = range(1, MAX_DRAFTS + 1) if drafts is None else [drafts]
    return {
        (e, d): mean_accepted(agreed, written.ended, d)
        for e, agreed in written.agreement().items()
        for d in choice
    }


def _on(heldout: dict[str, float]) -> dict[tuple[int, int], float]:
    """(exit, drafts) -> the drafts accepted on the way through held-out text."""
    accepted = {}
    for name, mean in heldout.items():
        if match := re.fullmatch(r"exit_(\d+)/(?:accepted_(\d+)|agreement)", name):
            accepted[int(match[1]), int(match[2] or 1)] = mean
    return accepted
