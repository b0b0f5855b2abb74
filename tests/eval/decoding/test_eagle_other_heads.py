"""Heads as others have them: RoPE that is not the target's, and the residual on the normed state."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from eval.decoding.draft_layer import draft_layer_runner
from layerskip_model.backbone import Backbone
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.errors import UserError
from layerskip_model.fused_layer import FusedJoinedLayer
from layerskip_model.layer_runner import LayerRunner
from layerskip_model.rope import Rope
from tests.eval.decoding.eagle_heads import CASES, Fitted
from tests.eval.decoding.test_self_tree import run
from tests.eval.decoding.test_speculate import PROMPTS
from tests.layerskip_model.test_eagle_format import LLAMA3
from tests.layerskip_model.test_rope import OWN
from tests.layerskip_model.tiny_eagle import READS, Head, half_of


def with_own_rope(head: Head, backbone: Backbone) -> Head:
    head.layer.rope = Rope(backbone, OWN["default"])
    return head


def with_norm_first(head: Head, backbone: Backbone) -> Head:
    if not isinstance(head, Eagle3Head):
        return head
    made = Eagle3Head(backbone, half_of(), READS, norm_before_residual=True).double()
    made.load_state_dict(head.state_dict())
    return made.requires_grad_(False).eval()


OTHERS: dict[str, Callable[[Head, Backbone], Head]] = {"rope": with_own_rope, "norm first": with_norm_first}


@cache
def fitted_with(other: str, kind: str) -> Fitted:
    """For a target with scaled RoPE where it may have that."""
    fitted = Fitted(kind, **({"rope_parameters": dict(LLAMA3)} if kind == "llama" else {}))
    for strategy in ("eagle2", "eagle3"):
        name = "eagle3" if strategy == "eagle3" else "eagle"
        fitted.heads[name] = OTHERS[other](fitted.head(strategy), fitted.runner.backbone)
    return fitted


def cases(other: str) -> list[str]:
    return [case for case in CASES if other == "rope" or case.startswith("eagle3")]


@pytest.mark.parametrize(("other", "case"), [(other, case) for other in OTHERS for case in cases(other)])
def test_they_draft_what_they_say_and_the_text_is_the_targets(other: str, case: str) -> None:
    """Every draft is that of a dense pass of the head as it is trained; `phi3` has layers that are not fused."""
    for kind in ("llama", "phi3"):
        fitted = fitted_with(other, kind)
        strategy = CASES[case][0]
        assert (fitted.drafts[strategy].layer.fused is None) == (kind == "phi3")
        fitted.check_drafts(case)
        rows = run(fitted.runner, fitted.drafter(case), PROMPTS)
        assert [row.tokens for row in rows] == fitted.future


def test_a_runner_with_the_targets_tables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug planted: RoPE of the head's own is forgotten."""
    before = LayerRunner.__init__

    def forgetful(self: LayerRunner, *args: Any, rope: Rope | None, **options: Any) -> None:
        assert rope is not None
        before(self, *args, **options)

    fitted = fitted_with("rope", "llama")
    monkeypatch.setattr(LayerRunner, "__init__", forgetful)
    with pytest.raises(UserError, match="its states are off by"):
        draft_layer_runner(fitted.runner, fitted.head("eagle3").layer)


def test_a_fused_layer_with_the_residual_of_the_paper_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug planted: the layer as it is in training is run instead."""
    before = FusedJoinedLayer.__init__

    def forgetful(self: FusedJoinedLayer, *args: Any) -> None:
        before(self, *args)
        assert self.norm_before_residual
        self.norm_before_residual = False

    fitted = fitted_with("norm first", "llama")
    monkeypatch.setattr(FusedJoinedLayer, "__init__", forgetful)
    assert draft_layer_runner(fitted.runner, fitted.head("eagle3").layer).fused is None


@pytest.mark.parametrize("case", ["eagle2, tree", "eagle3, chain"])
def test_tables_are_made_once_a_decode(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = fitted_with("rope", "llama")
    drafter = fitted.drafter(case)
    made: list[int] = []
    before = Rope.rotary

    def counted(self: Rope, like: torch.Tensor, position_ids: torch.Tensor, kind: str) -> object:
        made.append(position_ids.shape[1])
        return before(self, like, position_ids, kind)

    monkeypatch.setattr(Rope, "rotary", counted)
    run(fitted.runner, drafter, PROMPTS)
    assert len(made) == 1
