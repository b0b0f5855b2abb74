"""EAGLE and EAGLE-3 as objectives: terms, weights, noise, vocabulary, FLOPs; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layerskip_model.token_loss import IGNORE_INDEX
from layerskip_model.unrolled import Steps
from tests.tiny_models import tiny_model
from tests.train.small_recipe import small_values
from tests.train.test_flops import counted
from tests.train.test_medusa_objective import Windows, eager_model, some_batch
from train import UserError, parse_recipe
from train.memory import Needs, saved_beside
from train.objectives.draft_layer import DraftLayerObjective
from train.objectives.eagle import Eagle
from train.objectives.eagle3 import Eagle3

METHODS: dict[str, dict[str, Any]] = {
    "eagle": {"kind": "eagle", "steps": 2},
    "eagle3": {"kind": "eagle3", "steps": 3, "feature_layers": [1, 2, 3]},
}
STEPS = ["step_1", "step_2", "step_3"]
KINDS = list(METHODS)


def values(kind: str, objective: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    model = {"name_or_path": "somewhere", "autocast": "float32"} | changes.pop("model", {})
    return small_values(objective=METHODS[kind] | (objective or {}), model=model, **changes)


def build(kind: str, make: Any = tiny_model, **changes: Any) -> DraftLayerObjective[Any]:
    method: Any = {"eagle": Eagle, "eagle3": Eagle3}[kind]
    return method.build(parse_recipe(values(kind, **changes)), make(dtype=torch.float32))


def rows_of(*labels: list[int]) -> Windows:
    return Windows(*labels)


def test_eagle_weighs_regression_and_cross_entropy() -> None:
    """1.0 and 0.1 in the paper, both over the same places; `loss` is their weighted mean."""
    objective, batch = build("eagle").train(), some_batch()
    assert objective.weights == [1.0, 0.1]
    objective.weights = [0.7, 0.2]
    assert objective.count(batch) == {"regression": 2 + 5 + 9, "cross_entropy": 2 + 5 + 9}
    total, metrics = objective(batch, 0, {"regression": 5.0, "cross_entropy": 3.0})
    assert metrics.keys() == {"loss", "regression/loss", "cross_entropy/loss"}
    sums = [float(metrics[f"{term}/loss"][0]) for term in objective.terms]
    assert total.item() == pytest.approx(0.7 * sums[0] / 5 + 0.2 * sums[1] / 3, rel=1e-5)
    assert float(metrics["loss"][0]) == pytest.approx(0.7 * sums[0] + 0.2 * sums[1], rel=1e-5)
    assert float(metrics["loss"][1]) == 16
    assert objective.in_words(0, {"regression/loss": 0.25}) == "regression 0.250"


def test_each_step_is_weighed_and_divided_by_its_own_count() -> None:
    objective, batch = build("eagle3").train(), some_batch()
    assert objective.weights == pytest.approx([1.0, 0.8, 0.64])
    counts = {"step_1": 2 + 5 + 9, "step_2": 1 + 4 + 8, "step_3": 0 + 4 + 7}
    assert objective.count(batch) == counts
    denominators = {"step_1": 5.0, "step_2": 3.0, "step_3": 2.0}
    total, metrics = objective(batch, 0, denominators)
    assert metrics.keys() == {"loss", *(f"{step}/loss" for step in STEPS)}
    sums = {step: float(metrics[f"{step}/loss"][0]) for step in STEPS}
    weights = dict(zip(STEPS, (1.0, 0.8, 0.64), strict=True))
    expected = sum(weights[step] * sums[step] / denominators[step] for step in STEPS)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert {step: int(metrics[f"{step}/loss"][1]) for step in STEPS} == counts
    assert float(metrics["loss"][1]) == pytest.approx(sum(weights[step] * counts[step] for step in STEPS))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_stay_within_their_document(kind: str) -> None:
    batch = some_batch() | {"position_ids": torch.tensor([[*range(6), *range(4)]] * 3)}
    expected = {"eagle": [2 + 5 + 8] * 2, "eagle3": [2 + 5 + 8, 1 + 3 + 6, 0 + 3 + 4]}
    assert list(build(kind).count(batch).values()) == expected[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_only_the_head_trains(kind: str, tied: bool) -> None:
    """Of a model with tied embeddings, too; the model stays in evaluation mode and gets no gradient."""
    objective = build(kind, lambda **made: tiny_model(tie_word_embeddings=tied, **made)).train()
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trained == {f"module.head.{name}" for name, _ in objective.module.head.named_parameters()}
    assert objective.trainable_state().keys() == trained
    assert not objective.module.model.training
    objective(some_batch(), 0, {})[0].backward()
    assert {name for name, value in objective.named_parameters() if value.grad is not None} == trained


@pytest.mark.parametrize("kind", KINDS)
def test_a_held_out_measure_has_each_steps_quality(kind: str) -> None:
    """The same names for both, and the loss that is learnt; the acceptance length has the bonus token in it."""
    objective = build(kind, objective={"steps": 3}).eval()
    _, metrics = objective(some_batch(), 0, {})
    expected = {f"{term}/{what}" for term in ("lm", *STEPS) for what in ("loss", "top1", "top5")}
    expected |= {f"{step}/agreement" for step in STEPS} | {"loss", "acceptance_length"}
    assert metrics.keys() == expected | {f"{term}/loss" for term in objective.terms}
    assert [int(metrics[f"{step}/agreement"][1]) for step in STEPS] == [16, 13, 11]
    total, places = (float(part) for part in metrics["acceptance_length"])
    assert 1.0 <= total / places <= 4.0


def noise_of(objective: Any, batch: dict[str, Any], step: int) -> Tensor:
    """What each row's generator draws."""
    generators = objective.drawn(batch, step)["generators"]
    return torch.stack([torch.rand(4, generator=generator) for generator in generators])


def test_noise_belongs_to_seed_step_and_row() -> None:
    """However the global batch is cut, and after a resume, a row has the same noise; no two rows or steps have."""
    objective, batch = build("eagle"), some_batch() | {"row": [0, 1, 2]}
    whole = noise_of(objective, batch, 5)
    part = {"input_ids": batch["input_ids"][1:], "row": [1, 2]}
    assert torch.equal(noise_of(objective, part, 5), whole[1:])
    others = [noise_of(objective, batch, 6), noise_of(build("eagle", seed=1), batch, 5)]
    drawn = torch.cat([whole, *others]).flatten().tolist()
    assert len(set(drawn)) == len(drawn)
    loud = build("eagle", objective={"noise": 5.0}).train()
    loud.module.head.fc.weight.data.normal_(std=0.3)  # a new head does not look at the features yet
    losses = [loud(batch, step, {})[0].item() for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert loud.eval()(batch, 0, {})[0].item() == loud(batch, 1, {})[0].item()


@pytest.mark.parametrize(("kind", "size"), [("eagle", None), ("eagle3", None), ("eagle3", 20)])
def test_flops_are_what_torch_counts(kind: str, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward. Beside that, later steps attend to their own keys, and make their attention twice."""
    batch = some_batch()
    batch["labels"] = batch["input_ids"]  # all of them count
    monkeypatch.setattr(
        Steps, "is_causal", property(lambda _: False)
    )  # torch does not count what its kernel does
    objective = build(kind, eager_model, objective={"draft_vocab_size": size} if size else {})
    counts: dict[str, int] = {}

    def step() -> None:
        total, metrics = objective.train()(batch, 0, {})
        counts.update({term: int(metrics[f"{term}/loss"][1]) for term in objective.terms})
        total.backward()

    actual = counted(step)
    # The model sees 10 tokens of each row, and the head 9 of them.
    expected = objective.flops_of({}, 3, 10) + objective.head_flops(counts, 27, 9)
    if kind == "eagle3":
        expected += (
            2 * 32 * 64 * (27 - counts["step_1"]) * (size is not None)
        )  # it is asked about every place
        a_key = 27 * 4 * 4 * 8  # two products, over heads and their dimension, for every place
        expected += 2 * 9 * a_key
        assert expected <= actual <= expected + 4 * (1 + 2) * a_key
    else:
        assert actual == expected
    assert objective.step_flops(0, 3, 10) > expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_of_memory_counts_what_the_head_keeps(kind: str) -> None:
    """On tensors without values as much as on others, and by steps: the frozen model keeps nothing."""
    real = build(kind, eager_model).train()
    weights = {value.untyped_storage().data_ptr() for value in [*real.parameters(), *real.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = real.run_beside(2, 12)
    assert [tuple(output.shape) for output in outputs] == [(2, 11, 32)] * (3 if kind == "eagle3" else 1)
    with torch.device("meta"):
        model = eager_model(dtype=torch.float32)
    outline = build(kind, lambda **_: model)
    expected = sum(kept.values())
    assert saved_beside(outline, 2, 12, autocast=False) == pytest.approx(expected, rel=0.02)
    recipe = parse_recipe(values(kind))
    needs = Needs.of(recipe, outline, outline.module.model, micro=2, accumulates=False)
    assert needs.activations(checkpointing=True, cast=False)[0] == needs.saved
    assert needs.saved == saved_beside(outline, 2, recipe.batch.length, autocast=False) > 0


def test_the_vocabulary_is_of_the_training_rows() -> None:
    """The most frequent labels, of equal ones the lowest; input tokens and what does not count are nothing."""
    objective: Any = build("eagle3", objective={"draft_vocab_size": 3})
    many = [IGNORE_INDEX, 7, 7, 7, 9, 9, 40, 41]
    windows = rows_of(many, [IGNORE_INDEX, 9, 9, 40, 41, 3, IGNORE_INDEX, IGNORE_INDEX])
    assert objective.rows(windows, "train") is windows
    objective.rows(rows_of([50] * 8), "heldout")
    assert objective.module.head.t2d.nonzero()[:, 0].tolist() == [7, 9, 40]
    weight = objective.module.model.lm_head.weight[[7, 9, 40]]
    assert torch.equal(objective.module.head.projection.weight, weight)
    assert objective.notes() == ["the head says 3 of 64 tokens, 75.0% of the training labels"]
    batch = {key: torch.stack([row[key] for row in (windows[0], windows[1])]) for key in windows[0]}
    batch["input_ids"] = batch["input_ids"].clamp(min=0)
    counts = objective.count(batch)
    assert (counts["step_1"], counts["missing"]) == (7 + 5, 1 + 2)


def test_the_share_of_places_that_it_can_learn_from_is_measured() -> None:
    """Where the target's first choice is in the vocabulary."""
    objective: Any = build("eagle3", objective={"draft_vocab_size": 30})
    batch = some_batch()
    objective.rows(rows_of(*batch["labels"].tolist()), "train")
    _, metrics = objective.eval()(batch | {"row": [0, 1, 2]}, 0, {})
    chosen = objective.module.model(batch["input_ids"]).logits.argmax(-1)[:, 1:]
    judged = batch["labels"][:, 1:] != IGNORE_INDEX
    expected = (objective.module.head.t2d[chosen] & judged).sum()
    assert tuple(int(part) for part in metrics["coverage"]) == (int(expected), 16)
    assert 0 < expected < 16


def test_a_batch_of_which_the_vocabulary_has_no_label_is_refused() -> None:
    objective: Any = build("eagle3", objective={"draft_vocab_size": 1}).train()
    objective.rows(rows_of([5] * 10), "train")
    batch = some_batch()
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == 5, IGNORE_INDEX)
    counts = {name: float(count) for name, count in objective.count(batch).items()}
    with pytest.raises(
        UserError, match=r"^draft_vocab_size: none of the \d+ labels of the batch of step 3 is"
    ):
        objective(batch, 2, counts)
    objective(batch, 2, counts | {"missing": counts["missing"] - 1})
    objective(batch, 2, {"step_1": 1.0, "missing": 1.0})  # what the loop says of none, too
    earlier: Any = build("eagle3", objective={"draft_vocab_size": 1})
    earlier.config = earlier.config.model_copy(update={"init_heads": "x"})  # whose vocabulary stays
    with pytest.raises(UserError, match=r"none of the 10 labels of data\.train is among the 1 tokens"):
        earlier.rows(rows_of([5] * 10), "train")


@pytest.mark.parametrize(
    ("kind", "last", "fix"),
    [("eagle", "regression", "a longer batch.length"), ("eagle3", "step_3", "fewer objective.steps")],
)
def test_data_without_labels_for_every_step_is_refused(kind: str, last: str, fix: str) -> None:
    objective = build(kind)
    none, short = [IGNORE_INDEX] * 6, [IGNORE_INDEX] * 5 + [5]
    enough = [IGNORE_INDEX, 5, 5, 5, 5, 5]
    windows = rows_of(none, short, enough)
    assert objective.rows(windows, "train") is windows
    with pytest.raises(UserError, match=rf"^data\.train: no label counts for {last}: .*{fix}"):
        objective.rows(
            rows_of(none, [5, *[IGNORE_INDEX] * 5]) if kind == "eagle" else rows_of([5] * 3), "train"
        )
    objective.rows(rows_of(none), "heldout")


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_bfloat16_target_teaches_a_float32_head(kind: str) -> None:
    """The head's own arithmetic is float32 there too; the target's states are rounded."""
    made = build(kind, objective={} if kind == "eagle3" else {"noise": 0.0}).train()
    exact, _ = made(some_batch(), 0, {})
    made.module.model.bfloat16()
    loss, _ = made(some_batch(), 0, {})
    assert {value.dtype for value in made.module.head.parameters()} == {torch.float32}
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    assert all(value.grad is not None for value in made.module.head.parameters())


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("eagle", {"objective": {"steps": 0}}, "objective.steps: must be greater than or equal to 1, got 0"),
        ("eagle", {"objective": {"noise": -0.1}}, "objective.noise: must be greater than or equal to 0"),
        ("eagle", {"objective": {"decay": 0.8}}, "objective.decay: unknown key"),
        ("eagle3", {"objective": {"noise": 0.1}}, "objective.noise: unknown key"),
        ("eagle3", {"objective": {"decay": 0.0}}, "objective.decay: must be greater than 0, got 0.0"),
        (
            "eagle3",
            {"objective": {"draft_vocab_size": 0}},
            "objective.draft_vocab_size: must be greater than or",
        ),
        ("eagle3", {"objective": {"feature_layers": [1, 2]}}, "objective.feature_layers: "),
    ],
)
def test_settings_that_cannot_be_meant(kind: str, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(values(kind, **changes))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


STREAM = {
    "train": [{"kind": "text", "files": ["x"], "streaming": True}],
    "heldout": [{"kind": "text", "files": ["y"]}],
}


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("eagle", {"model": {"lora": {"rank": 2}}}, "model.lora: objective.kind: eagle trains a head alone"),
        ("eagle3", {"model": {"lora": {"rank": 2}}}, "model.lora: objective.kind: eagle3 trains a head alone"),
        ("eagle", {"batch": {"sequences": 8, "length": 3}}, "batch.length: 3 leaves step 2 nothing to predict"),
        ("eagle3", {"batch": {"sequences": 8, "length": 4}}, "batch.length: 4 leaves step 3 nothing to predict"),
        ("eagle3", {"evaluate": {"decode": {"exit_layer": 1}}}, "evaluate.decode.exit_layer: objective.kind: eagle3"),
        ("eagle", {"objective": {"init_heads": "nowhere"}}, "heads 'nowhere': no config.json in it"),
        (
            "eagle3",
            {"objective": {"draft_vocab_size": 65}},
            "objective.draft_vocab_size: 65 tokens can not be chosen of the target's 64; give 1 to 64",
        ),
        (
            "eagle3",
            {"objective": {"feature_layers": None}},
            "objective.feature_layers: [2, 2, 1] are not three different layers in order of a model of 4",
        ),
        ("eagle3", {"objective": {"feature_layers": [1, 1, 3]}}, "objective.feature_layers: [1, 1, 3] are not three"),
        ("eagle3", {"objective": {"feature_layers": [3, 2, 1]}}, "objective.feature_layers: [3, 2, 1] are not three"),
        ("eagle3", {"objective": {"feature_layers": [1, 2, 4]}}, "give three of 1 to 3 in order"),
        (
            "eagle3",
            {"objective": {"draft_vocab_size": 20}, "data": STREAM},
            "objective.draft_vocab_size: the 20 most frequent tokens are counted before the run, and a stream",
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together(kind: str, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        build(kind, **changes)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shallow_model_is_for_eagle() -> None:
    def shallow(**made: Any) -> Any:
        return tiny_model(num_hidden_layers=3, **made)

    build("eagle", shallow)
    with pytest.raises(UserError, match=r"^objective\.feature_layers: .* too shallow for EAGLE-3; use EAGLE"):
        build("eagle3", shallow, objective={"feature_layers": None})


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_has_no_head_to_train(kind: str) -> None:
    recipe = parse_recipe(small_values(objective=METHODS[kind]))
    method: Any = {"eagle": Eagle, "eagle3": Eagle3}[kind]
    with pytest.raises(
        UserError, match=rf"kind: {kind} trains heads of a model that exists; give model\.name"
    ):
        method.build(recipe, tiny_model())
