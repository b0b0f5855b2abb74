"""Hydra as an objective: terms by their names, FLOPs, and what is refused. What heads share is tested with Medusa's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny_models import tiny_model
from tests.train.small_recipe import small_values
from tests.train.test_flops import counted
from tests.train.test_medusa_objective import eager_model, some_batch
from train import UserError, parse_recipe
from train.objectives.hydra import Hydra

HEADS = ["head_1", "head_2", "head_3"]
PLUS = {"layers": 4, "prefix_attention": True}


def values(objective: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    method = {"kind": "hydra", "heads": 3} | (objective or {})
    model = {"name_or_path": "somewhere", "autocast": "float32"} | changes.pop("model", {})
    return small_values(objective=method, model=model, **changes)


def build(make: Any = tiny_model, **changes: Any) -> Hydra:
    return Hydra.build(parse_recipe(values(**changes)), make(dtype=torch.float32))


@pytest.mark.parametrize(("loss", "learnt"), [("teacher", "divergence"), ("labels", "loss")])
def test_terms_are_called_what_they_are(loss: str, learnt: str) -> None:
    """A divergence from the model is no loss of the text; evaluation has both, and the mean of what is learnt."""
    batch = some_batch()
    objective = build(objective={"loss": loss, "decay": 0.5}).train()
    denominators = {"head_1": 5.0, "head_2": 3.0, "head_3": 2.0}
    total, metrics = objective(batch, 0, denominators)
    assert metrics.keys() == {"loss", *(f"{head}/{learnt}" for head in HEADS)}
    expected = sum(
        0.5**k * float(metrics[f"{head}/{learnt}"][0]) / denominators[head]
        for k, head in enumerate(HEADS, start=1)
    )
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert {head: int(metrics[f"{head}/{learnt}"][1]) for head in HEADS} == objective.count(batch)
    assert objective.in_words(0, {"head_1/divergence": 1.0, "head_1/loss": 1.0}) == "head_1 1.00"

    _, measured = objective.eval()(batch, 0, {})
    names = {f"{term}/{what}" for term in ("lm", *HEADS) for what in ("loss", "top1", "top5")}
    names |= {f"{head}/agreement" for head in HEADS} | {"loss", "acceptance_length"}
    assert measured.keys() == names | (
        {f"{head}/divergence" for head in HEADS} if loss == "teacher" else set()
    )
    sums = [float(measured[f"{head}/{learnt}"][0]) for head in HEADS]
    assert float(measured["loss"][0]) == pytest.approx(sum(0.5**k * s for k, s in enumerate(sums, start=1)))


def test_only_heads_train() -> None:
    objective = build(objective=PLUS)
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trained == {f"module.heads.{name}" for name in objective.module.heads.state_dict()}
    assert any(".prefix.layer." in name for name in trained)
    assert objective.trainable_state().keys() == trained
    assert not objective.train().module.model.training


@pytest.mark.parametrize("loss", ["teacher", "labels"])
@pytest.mark.parametrize("method", [{}, {"layers": 3}, PLUS], ids=["plain", "layers", "plus"])
def test_flops_are_what_torch_counts(method: dict[str, Any], loss: str) -> None:
    """Forward and backward; step_flops takes every token for predicted, also the last of a row."""
    batch = some_batch()
    batch["labels"] = batch["input_ids"]  # all of them count
    objective = build(eager_model, objective=method | {"loss": loss}).train()
    actual = counted(lambda: objective(batch, 0, {})[0].backward())
    counts = dict(zip(["lm", *HEADS], (30, 27, 24, 21), strict=True))
    assert actual == objective.flops_of(counts, 3, 10)
    assert objective.step_flops(0, 3, 10) > actual


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"objective": {"heads": 0}}, "objective.heads: must be greater than or equal to 1, got 0"),
        ({"objective": {"dropout": 1.0}}, "objective.dropout: must be less than 1, got 1.0"),
        ({"objective": {"loss": "both"}}, "objective.loss: "),
        ({"objective": {"stage": "joint"}}, "objective.stage: unknown key"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(values(**changes))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"lora": {"rank": 2}}}, "model.lora: objective.kind: hydra trains heads alone"),
        ({"batch": {"sequences": 8, "length": 3}}, "batch.length: 3 leaves head 3 nothing to predict"),
        ({"objective": {"init_heads": "nowhere"}}, "heads 'nowhere': no config.json in it"),
    ],
)
def test_parts_that_do_not_go_together(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        build(**changes)
    assert expected in str(caught.value)


def test_a_new_model_has_no_heads_to_train() -> None:
    with pytest.raises(UserError, match=r"kind: hydra trains heads of a model that exists"):
        Hydra.build(parse_recipe(small_values(objective={"kind": "hydra"})), tiny_model())


def test_a_suggestion_is_by_the_acceptance() -> None:
    assert build().suggestion({"acceptance_length": 2.3}, None, {})["strategy"] == "hydra"
