"""Medusa as an objective: from a recipe's section to terms, weights, rates, FLOPs; and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from layerskip_model.token_loss import IGNORE_INDEX
from tests.tiny_models import tiny_model
from tests.tiny_models import tiny_model as tiny_model_of
from tests.train.small_recipe import small_values
from tests.train.test_flops import counted
from train import UserError, parse_recipe
from train.objectives.medusa import Medusa
from train.optimizer import parameter_groups

TERMS = ["lm", "head_1", "head_2", "head_3"]


def values(objective: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    method = {"kind": "medusa", "heads": 3} | (objective or {})
    model = {"name_or_path": "somewhere", "autocast": "float32"} | changes.pop("model", {})
    return small_values(objective=method, model=model, **changes)


def build(**changes: Any) -> Medusa:
    return Medusa.build(parse_recipe(values(**changes)), tiny_model(dtype=torch.float32))


def joint(monkeypatch: pytest.MonkeyPatch, **objective: Any) -> Medusa:
    """With new heads in the place of those that init_heads names."""
    from layerskip_model.medusa import MedusaHeads

    monkeypatch.setattr(
        "train.objectives.medusa._earlier_heads",
        lambda config, backbone: MedusaHeads.new(backbone, heads=3, layers=config.layers, shared=False),
    )
    return build(objective={"stage": "joint", "init_heads": "x"} | objective)


def some_batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (3, 11), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, 3:] = IGNORE_INDEX
    labels[1, ::2] = IGNORE_INDEX
    return {"input_ids": tokens[:, :-1], "labels": labels, "row": [0, 1, 2]}


def test_each_term_is_weighed_and_divided_by_its_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    denominators = {"lm": 7.0, "head_1": 5.0, "head_2": 3.0, "head_3": 2.0}
    batch = some_batch()
    for objective, lm, scale in (
        (build(), 0.0, 1.0),
        (joint(monkeypatch, lambda_0=0.3), 1.0, 0.3),
    ):
        objective.train()
        names = TERMS if lm else TERMS[1:]
        assert list(objective.count(batch)) == names
        loss, metrics = objective(batch, 0, {name: denominators[name] for name in names})
        assert metrics.keys() == {"loss", *(f"{name}/loss" for name in names), *(["lambda_0"] if lm else [])}
        weights = dict(zip(TERMS, [lm, 0.8 * scale, 0.64 * scale, 0.512 * scale], strict=True))
        totals = {name: float(metrics[f"{name}/loss"][0]) for name in names}
        expected = sum(weights[name] * totals[name] / denominators[name] for name in names)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        counts = {name: int(metrics[f"{name}/loss"][1]) for name in names}
        assert counts == objective.count(batch)
        total, count = (float(part) for part in metrics["loss"])
        assert total == pytest.approx(sum(weights[name] * totals[name] for name in names), rel=1e-5)
        assert count == pytest.approx(sum(weights[name] * counts[name] for name in names))


def test_counts_are_of_the_shifted_labels() -> None:
    batch = some_batch()
    assert build().count(batch) == {"head_1": 2 + 5 + 9, "head_2": 1 + 4 + 8, "head_3": 0 + 4 + 7}
    apart = batch | {"position_ids": torch.tensor([[*range(6), *range(4)]] * 3)}
    assert build().count(apart) == {"head_1": 2 + 5 + 8, "head_2": 1 + 3 + 6, "head_3": 0 + 3 + 4}


def test_lambda_0_ramps_as_a_sine(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = joint(monkeypatch, lambda_0=0.01, ramp="sine")  # over 4 steps
    assert [objective.scale(step) for step in range(5)] == pytest.approx(
        [0.01 * math.sin(math.pi / 2 * step / 4) for step in range(5)]
    )
    assert joint(monkeypatch).scale(3) == 0.2
    assert build().scale(3) == 1.0


def test_only_heads_train_on_a_frozen_model() -> None:
    objective = build()
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trained == {f"module.heads.{name}" for name in objective.module.heads.state_dict()}
    assert objective.trainable_state().keys() == trained
    assert not objective.train().module.model.training
    (matrices, biases) = parameter_groups(parse_recipe(values()).optimizer, objective)
    assert (matrices.lr, biases.lr) == (0.005, 0.005)


def test_beside_a_model_heads_learn_faster_biases_too(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = joint(monkeypatch, head_lr_multiple=4.0)
    assert objective.train().module.model.training
    for name, parameter in objective.named_parameters():
        assert parameter.requires_grad
        assert objective.learning_rate_multiple(name) == (4.0 if ".heads." in name else 1.0)
    rates = {
        (group.lr, group.weight_decay)
        for group in parameter_groups(parse_recipe(values()).optimizer, objective)
    }
    assert rates == {(0.005, 0.1), (0.005, 0.0), (0.02, 0.1), (0.02, 0.0)}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("stage", ["heads", "joint"])
def test_flops_are_what_torch_counts(stage: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; step_flops takes every token for predicted, also the last of a row."""
    batch = some_batch()
    batch["labels"] = batch["input_ids"]  # all of them count
    monkeypatch.setattr("tests.train.test_medusa_objective.tiny_model", eager_model)
    objective = joint(monkeypatch, layers=layers) if stage == "joint" else build(objective={"layers": layers})
    objective.train()
    actual = counted(lambda: objective(batch, 0, {})[0].backward())
    counts = dict(zip(TERMS, (30, 27, 24, 21), strict=True))
    assert actual == objective.flops_of(counts, 3, 10)
    assert objective.step_flops(0, 3, 10) == objective.flops_of(dict.fromkeys(TERMS, 30), 3, 10) > actual


def eager_model(**settings: Any) -> PreTrainedModel:
    """Whose attention torch counts."""
    return tiny_model_of(attention="eager", **settings)


def test_a_held_out_measure_has_each_heads_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    for objective in (build(), joint(monkeypatch)):
        _, metrics = objective.eval()(some_batch(), 0, {})
        expected = {f"{term}/{what}" for term in TERMS for what in ("loss", "top1", "top5")}
        expected |= {f"{term}/agreement" for term in TERMS[1:]} | {"loss", "acceptance_length"}
        extra = set() if objective.config.freezes_model else {"bits_per_token"}
        assert metrics.keys() == expected | extra
        counts = [int(metrics[f"{term}/top1"][1]) for term in TERMS]
        assert counts == [18, 16, 13, 11]  # each its own


class Windows:
    """Rows with few labels that count."""

    def __init__(self, *labels: list[int]) -> None:
        self.labels = [torch.tensor(row) for row in labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.labels[row], "labels": self.labels[row]}


def test_data_without_labels_for_every_head_is_refused() -> None:
    objective = build()
    short, none = [IGNORE_INDEX, 5, 5, IGNORE_INDEX, IGNORE_INDEX], [IGNORE_INDEX] * 5
    enough = [IGNORE_INDEX, 5, 5, 5, 5]
    windows = Windows(none, short, enough)
    assert objective.rows(windows, "train") is windows
    with pytest.raises(UserError, match=r"no label counts for head_3: .* fewer objective\.heads than 3"):
        objective.rows(Windows(none, short), "train")
    with pytest.raises(UserError, match=r"data\.train: no label counts for lm"):
        objective.rows(Windows(none), "train")
    objective.rows(Windows(none), "heldout")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"objective": {"heads": 0}}, "objective.heads: must be greater than or equal to 1, got 0"),
        ({"objective": {"stage": "joint"}}, "stage: joint needs init_heads"),
        ({"objective": {"lambda_0": 0.5}}, "lambda_0: 0.5 is for stage: joint"),
        ({"objective": {"self_distillation": True}}, "self_distillation: True is for stage: joint"),
        (
            {"objective": {"stage": "joint", "init_heads": "x"}, "model": {"dtype": "bfloat16"}},
            "model.dtype: bfloat16 is for frozen weights",
        ),
        (
            {"objective": {"stage": "joint", "init_heads": "x"}, "model": {"quantization": "4bit"}},
            "model.quantization: 4bit is for a model that stays as it is",
        ),
        ({"model": {"quantization": "2bit"}}, "model.quantization: "),
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
        ({"model": {"lora": {"rank": 2}}}, "model.lora: adapters train with objective.stage: joint"),
        ({"batch": {"sequences": 8, "length": 3}}, "batch.length: 3 leaves head 3 nothing to predict"),
        (
            {"evaluate": {"decode": {"exit_layer": 1}}},
            "evaluate.decode.exit_layer: objective.kind: medusa drafts with its heads; leave it out",
        ),
        (
            {"objective": {"stage": "joint", "init_heads": "nowhere"}},
            "heads 'nowhere': no config.json in it",
        ),
    ],
)
def test_parts_that_do_not_go_together(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        build(**changes)
    assert expected in str(caught.value)


def test_a_new_model_has_no_heads_to_train() -> None:
    with pytest.raises(UserError, match=r"trains heads of a model that exists; give model\.name_or_path"):
        Medusa.build(parse_recipe(small_values(objective={"kind": "medusa"})), tiny_model())


def test_a_teacher_needs_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"self_distillation: .* add model\.lora"):
        joint(monkeypatch, self_distillation=True)


def test_a_suggestion_is_by_the_acceptance() -> None:
    told = build().suggestion({"acceptance_length": 2.3}, None, {})
    assert told == {"strategy": "medusa", "settings": {}, "predicted_speedup": pytest.approx(2.0)}
