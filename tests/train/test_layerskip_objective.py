"""LayerSkip as an objective: from a recipe's section to the module, its loss, its metrics, its suggestion."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.replay import OwnText, mean_accepted
from layerskip_model.early_exit import ExitLoss
from layerskip_model.layer_dropout import LayerDropout
from layerskip_model.runner import Runner
from tests.tiny_models import agreeing_model, tiny_model
from tests.train.tiny_runs import recipe_values
from train import Recipe, UserError, parse_recipe
from train.objectives.layerskip import LayerSkip, spans
from train.objectives.self_speculation import COST_PER_ROW, MAX_DRAFTS


def recipe_with(**objective: Any) -> Recipe[Any]:
    return parse_recipe(
        recipe_values(Path("unused"), Path("unused"), objective={"kind": "layerskip"} | objective)
    )


def build(model: PreTrainedModel | None = None, **objective: Any) -> LayerSkip:
    return LayerSkip.build(recipe_with(**objective), tiny_model() if model is None else model)


def some_batch(rows: int = 3) -> dict[str, Any]:
    """Tokens with some labels masked, row indexes that are not 0, 1, 2."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (rows, 11), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, 3:] = -100
    labels[1, ::2] = -100
    return {"input_ids": tokens[:, :-1], "labels": labels, "row": [5, 0, 9][:rows]}


def test_the_sections_reach_the_module() -> None:
    objective = build(
        layer_dropout={"p_max": 0.3, "over_depth": "linear", "over_time": "exp", "layers": "1::2"},
        early_exit={"exits": [2, 3], "weights": "sqrt", "curriculum": "rotational", "every": 3},
    )
    assert objective.module.dropout == LayerDropout(
        p_max=0.3, over_depth="linear", over_time="exp", layers="1::2", num_layers=4, total_steps=4, seed=0
    )
    assert objective.module.exit_loss == ExitLoss(
        num_layers=4,
        total_steps=4,
        exits=[2, 3],
        weights="sqrt",
        e_scale=1.0,
        curriculum="rotational",
        every=3,
    )


def test_without_sections_it_is_plain_training() -> None:
    objective = build().train()
    assert objective.module.dropout is None
    batch = some_batch()
    loss, metrics = objective(batch, 0, {"tokens": 1.0})
    logits = objective.module.model(batch["input_ids"]).logits
    expected = functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics.keys() == {"loss", "exit_4/loss"}


def test_no_dropout_at_rate_zero() -> None:
    assert build(layer_dropout={"p_max": 0.0}).module.dropout is None


def test_a_slice_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"layer_dropout\.layers: '9:' names none of the model's 4 layers"):
        build(layer_dropout={"p_max": 0.5, "layers": "9:"})


def test_all_exits_are_every_layer() -> None:
    assert list(build(early_exit={}).module.exit_loss.exits) == [1, 2, 3, 4]


@pytest.mark.parametrize("exit_layer", [4, 5])
def test_an_exit_that_is_not_early_is_refused(exit_layer: int) -> None:
    with pytest.raises(
        UserError, match=rf"exits: {exit_layer} is not an early exit of a model with 4 layers; use 1 to 3"
    ):
        build(early_exit={"exits": [2, exit_layer]})


def test_the_loss_is_the_weighted_mean_of_the_exits() -> None:
    """J(t) in eq. 4 to 6 of arXiv 2404.16710, by full logits; the metrics are unweighted."""
    objective = build(early_exit={"e_scale": 0.5}).train()
    batch = some_batch()
    tokens = objective.count(batch)["tokens"]
    assert tokens == 3 + 5 + 10
    loss, metrics = objective(batch, 0, {"tokens": 2.0 * tokens})
    model = objective.module.model
    states = model(batch["input_ids"], output_hidden_states=True).hidden_states[1:]
    flat = batch["labels"].flatten()
    raw = {1: 0.0, 2: 0.5 * 1, 3: 0.5 * (1 + 2), 4: 3 + 0.5 * (0 + 1 + 2)}
    expected = 0.0
    for exit_layer, hidden in enumerate(states, start=1):
        normed = hidden if exit_layer == 4 else model.model.norm(hidden)
        nats = functional.cross_entropy(
            model.lm_head(normed).flatten(0, 1), flat, ignore_index=-100, reduction="sum"
        ).item()
        expected += raw[exit_layer] / sum(raw.values()) * nats / (2.0 * tokens)
        if raw[exit_layer]:
            total, count = metrics[f"exit_{exit_layer}/loss"]
            assert float(total.detach()) == pytest.approx(nats, rel=1e-5)
            assert int(count) == tokens
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert "exit_1/loss" not in metrics  # e(0) = 0
    assert metrics["loss"] == metrics["exit_4/loss"]


def test_evaluation_measures_every_exit_and_drops_nothing() -> None:
    model = tiny_model()
    objective = build(model, layer_dropout={"p_max": 0.9}, early_exit={"exits": [2]}).eval()
    batch = some_batch()
    with torch.no_grad():
        _, metrics = objective(batch, 3, {"tokens": 1.0})
        logits = model(batch["input_ids"]).logits.flatten(0, 1)
    flat = batch["labels"].flatten()
    names = {f"exit_{e}/{name}" for e in (1, 2, 3, 4) for name in ("loss", "top1", "agreement")}
    runs = {f"exit_{e}/accepted_{drafts}" for e in (1, 2, 3) for drafts in (2, 4, 8)}
    assert metrics.keys() == names | runs | {"loss", "bits_per_token"}
    nats = functional.cross_entropy(logits, flat, ignore_index=-100, reduction="sum").item()
    assert float(metrics["loss"][0]) == pytest.approx(nats, rel=1e-5)
    assert float(metrics["bits_per_token"][0]) == pytest.approx(nats / math.log(2.0), rel=1e-5)
    assert {int(count) for name, (_, count) in metrics.items() if name not in runs} == {18}
    assert metrics["exit_4/agreement"][0] == 18
    assert metrics["exit_4/top1"][0] == int((logits.argmax(-1) == flat).sum())


def test_dropout_follows_the_row_in_the_global_batch() -> None:
    objective = build(layer_dropout={"p_max": 0.7}).train()
    batch = some_batch()
    loss, _ = objective(batch, 1, {"tokens": 1.0})
    parts = 0.0
    for row in (2, 0, 1):  # alone, in another order: the same decisions
        one = {name: value[row : row + 1] for name, value in batch.items()}
        parts += objective(one, 1, {"tokens": 1.0})[0].item()
    assert loss.item() == pytest.approx(parts, rel=1e-5)
    batch["row"] = [1, 2, 3]
    assert objective(batch, 1, {"tokens": 1.0})[0].item() != pytest.approx(loss.item(), rel=1e-3)


def test_a_checkpoint_holds_every_parameter_and_tied_ones_once() -> None:
    for tied in (False, True):
        model = tiny_model(tie_word_embeddings=tied)
        objective = build(model)
        state = objective.trainable_state()
        assert len(state) == len(list(model.parameters()))
        saved = {name: value.detach().clone() for name, value in state.items()}
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        objective.load_trainable_state(saved)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_in_force_is_logged_for_the_global_batch() -> None:
    """Alike however the batch is cut, and rows that only fill up a rank count nothing."""
    objective = build(
        layer_dropout={"p_max": 0.6}, early_exit={"curriculum": "rotational", "every": 2, "e_scale": 0.5}
    ).train()
    batch = some_batch()
    rates, weights = objective.schedule(1)["layer_dropout"], objective.schedule(1)["exit_weight"]
    assert rates == pytest.approx([0.6 * (2 ** (layer / 3) - 1) for layer in range(4)])
    assert [weight > 0 for weight in weights] == [False, True, False, True]
    assert sum(weights) == pytest.approx(1.0)
    _, metrics = objective(batch, 1, {"tokens": 1.0})
    assert metrics["layer_dropout/mean"] == (pytest.approx(sum(rates) / 4), 1.0)
    assert metrics["layer_dropout/max"] == (pytest.approx(0.6), 1.0)
    assert metrics["exits_on"] == (2.0, 1.0)
    assert objective.module.dropout is not None
    kept = objective.module.dropout.kept(1, batch["row"])
    assert [int(x) for x in metrics["layer_dropout/skipped"]] == [int((~kept).sum()), 12]
    total = torch.zeros(2)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        total += torch.tensor(objective(one, 1, {"tokens": 1.0})[1]["layer_dropout/skipped"])
    filling = {name: value[:1] for name, value in batch.items()}
    filling["labels"] = torch.full_like(filling["labels"], -100)
    total += torch.tensor(objective(filling, 1, {"tokens": 1.0})[1]["layer_dropout/skipped"])
    assert total.tolist() == [int((~kept).sum()), 12]


def test_the_progress_line_names_exits_and_rates() -> None:
    objective = build(layer_dropout={"p_max": 0.1}, early_exit={})
    words = objective.in_words(0, {"exit_2/loss": 2.345, "exit_3/loss": 2.0})
    assert words == "exits 2 (2.35) 3 (2.00)  dropout 0.046 to 0.100"
    assert build().in_words(0, {}) == ""
    many = build(tiny_model(num_hidden_layers=12), early_exit={"weights": "uniform"})
    assert many.in_words(0, {}) == "exits 1-11"
    assert spans([1, 2, 5, 7, 8, 9, 12]) == "1 2 5 7-9 12"


def test_runs_of_agreement_on_held_out_text_stay_in_their_document() -> None:
    objective = build(agreeing_model(scale=0.3)).eval()
    batch = some_batch()
    batch["labels"][:] = 0  # everything counts
    positions = torch.arange(10).repeat(3, 1)
    positions[:, 4:] -= 4
    with torch.no_grad():
        joined = objective(batch, 0, {"tokens": 1.0})[1]
        separate = objective(batch | {"position_ids": positions}, 0, {"tokens": 1.0})[1]
    for exit_layer in (1, 2, 3):
        for drafts, places in ((2, 9), (4, 7), (8, 3)):
            assert int(joined[f"exit_{exit_layer}/accepted_{drafts}"][1]) == 3 * places
        for drafts, places in ((2, 3 + 5), (4, 1 + 3), (8, 0)):
            assert int(separate[f"exit_{exit_layer}/accepted_{drafts}"][1]) == 3 * places
    assert not any(name.startswith("exit_4/accepted") for name in joined)


def test_of_a_deep_model_some_exits_are_measured_so() -> None:
    deep = build(tiny_model(num_hidden_layers=40), early_exit={"exits": [5, 9]}).eval()
    with torch.no_grad():
        metrics = deep(some_batch(), 0, {"tokens": 1.0})[1]
    measured = [e for e in range(1, 41) if f"exit_{e}/accepted_4" in metrics]
    assert measured == sorted({*range(3, 40, 3), 5})


def test_flops_follow_dropout_and_curriculum() -> None:
    plain = build()
    both = build(layer_dropout={"p_max": 0.9}, early_exit={"weights": "uniform"})
    assert both.module.dropout is not None
    kept = both.module.dropout.kept(2, range(8)).sum(1).tolist()
    assert sum(kept) < 32
    assert both.step_flops(2, 8, 10) == both.flops.step(kept, 10, 4, 80.0)
    assert plain.step_flops(2, 8, 10) == plain.flops.step([8] * 4, 10, 1, 80.0)


# --- the suggestion


def speedup(accepted: float, exit_layer: int, drafts: int, layers: int = 4) -> float:
    lower = exit_layer / layers
    return (1 + accepted) / ((drafts + 1) * lower + (1 + COST_PER_ROW * drafts) * (1 - lower))


def test_the_suggestion_is_the_best_for_the_text_that_the_model_writes() -> None:
    model = agreeing_model(scale=0.25)
    runner = Runner(model, fuse=False)
    prompts = [[5, 9, 2], [7]]
    generated = decode(
        runner, make_drafter("autoregressive", runner), prompts, max_new_tokens=40, eos_token_ids=[]
    )
    written = OwnText(runner, prompts, [generation.tokens for generation in generated], [False, False])
    objective = build(model)
    agreement = written.agreement()
    table = {
        (e, d): speedup(mean_accepted(agreement[e], written.ended, d), e, d)
        for e in (1, 2, 3)
        for d in range(1, MAX_DRAFTS + 1)
    }
    told = objective.suggestion({}, written, {})
    best = max(table, key=lambda key: table[key])
    assert told["strategy"] == "self_speculative"
    assert told["settings"] == {"exit_layer": best[0], "num_speculations": best[1]}
    assert told["predicted_speedup"] == pytest.approx(table[best])
    told = objective.suggestion({}, written, {"exit_layer": 2, "num_speculations": 20})
    assert told["settings"] == {"exit_layer": 2, "num_speculations": 20}
    assert told["predicted_speedup"] == pytest.approx(
        speedup(mean_accepted(agreement[2], written.ended, 20), 2, 20)
    )


def test_without_such_text_it_is_the_best_on_held_out_text() -> None:
    means = {(1, 1): 0.2, (2, 1): 0.7, (2, 2): 1.3, (2, 4): 2.1, (2, 8): 2.6, (3, 1): 0.8, (3, 2): 1.5}
    heldout = {f"exit_{e}/accepted_{d}" if d > 1 else f"exit_{e}/agreement": m for (e, d), m in means.items()}
    told = build().suggestion(heldout | {"exit_4/agreement": 1.0, "loss": 3.0}, None, {})
    best = max(means, key=lambda key: speedup(means[key], *key))
    assert told["settings"] == {"exit_layer": best[0], "num_speculations": best[1]} != {}


def test_a_model_of_one_layer_has_nothing_to_draft_with() -> None:
    told = build(tiny_model(num_hidden_layers=1), early_exit={}).suggestion({}, None, {})
    assert told == {"strategy": "autoregressive", "settings": {}, "predicted_speedup": 1.0}


def test_an_exit_to_decode_with_that_there_is_not_is_refused() -> None:
    evaluate = {"decode": {"exit_layer": 4}}
    recipe = parse_recipe(recipe_values(Path("unused"), Path("unused"), evaluate=evaluate))
    with pytest.raises(
        UserError, match=r"evaluate\.decode\.exit_layer: 4 is not an early exit .* use 1 to 3"
    ):
        LayerSkip.build(recipe, tiny_model())
