"""The contract of an objective, proven by a toy method that uses all of it (see toy_heads)."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.train.tiny_runs import at_step, log_lines, recipe_values
from tests.train.tiny_runs import write_text as write_text_into
from tests.train.toy_heads import ToyHeads
from train import Interrupted, Recipe, loop, parse_recipe, train
from train.checkpoint import list_checkpoints
from train.objectives import OBJECTIVES


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_into(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "toy_heads", ToyHeads)


def toy_recipe(
    output_dir: Path, text: Path, *, objective: dict[str, Any] | None = None, **changes: Any
) -> Recipe[Any]:
    objective = {"kind": "toy_heads"} | (objective or {})
    return parse_recipe(recipe_values(output_dir, text, objective=objective, **changes))


def heads(run: Path) -> dict[str, Tensor]:
    return load_file(run / "export" / "heads.safetensors")


def assert_close_heads(left: Path, right: Path) -> None:
    ours, theirs = heads(left), heads(right)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=2e-5)


def test_only_the_heads_learn_and_are_saved(text: Path, tmp_path: Path) -> None:
    run = train(toy_recipe(tmp_path / "run", text, max_steps=20))
    objective = ToyHeads.built
    for name, value in objective.model.state_dict().items():
        assert torch.equal(value, objective.frozen_before[name]), name
        assert not objective.model.training
    names = {f"{head}.{part}" for head in "01" for part in ("weight", "bias")}
    assert heads(run).keys() == names
    assert all(not torch.equal(heads(run)[name], objective.heads_before[name]) for name in names)
    losses = [line["loss"] for line in log_lines(run) if "loss" in line]
    assert losses[-1] < losses[0]
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert load_file(newest / "trainable.safetensors").keys() == {f"heads.{name}" for name in names}
    state = torch.load(newest / "optimizer.pt", weights_only=True)
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"]) == 4
    told = json.loads((run / "run.json").read_text())
    assert told["kind"] == "toy_heads"
    assert told["suggested"] == {"strategy": "toy", "settings": {"loss": told["heldout_metrics"]["loss"]}}
    assert "bits_per_byte" not in told["heldout_metrics"]  # its loss is not the language model's


def test_cached_features_and_tokens_are_two_kinds_of_batch(text: Path, tmp_path: Path) -> None:
    train(toy_recipe(tmp_path / "online", text))
    assert ToyHeads.kinds_of_batch == {(True, False), (False, False)}
    train(toy_recipe(tmp_path / "cached", text, objective={"cached": True}))
    assert ToyHeads.kinds_of_batch == {(True, True), (False, False)}
    assert_close_heads(tmp_path / "online", tmp_path / "cached")


@pytest.mark.parametrize("micro", [1, 3])
def test_each_term_has_its_own_denominator(micro: int, text: Path, tmp_path: Path) -> None:
    train(toy_recipe(tmp_path / "whole", text))
    batch = {"sequences": 8, "length": 16, "micro": micro}
    train(toy_recipe(tmp_path / "micro", text, batch=batch))
    assert_close_heads(tmp_path / "whole", tmp_path / "micro")


def test_denominators_count_the_global_batch(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, dict[str, float]]] = []
    forward = ToyHeads.forward

    def spy(self: ToyHeads, batch: Any, step: int, denominators: dict[str, float]) -> Any:
        seen.append((self.training, denominators))
        return forward(self, batch, step, denominators)

    monkeypatch.setattr(ToyHeads, "forward", spy)
    train(toy_recipe(tmp_path / "run", text, max_steps=1, batch={"sequences": 8, "length": 16, "micro": 3}))
    training = [denominators for is_training, denominators in seen if is_training]
    assert training == [{"head_0": 8.0 * 16, "head_1": 8.0 * 15}] * 3


def test_learning_rate_multiples(text: Path, tmp_path: Path) -> None:
    """AdamW's first step is lr times the gradient's sign, where the gradient is much larger than eps."""
    optimizer = {"kind": "adamw", "lr": 0.01, "eps": 1e-12, "weight_decay": 0.0}
    run = train(
        toy_recipe(tmp_path / "run", text, max_steps=1, optimizer=optimizer, schedule={"kind": "constant"})
    )
    before, after = ToyHeads.built.heads_before, heads(run)
    moved = {head: (after[f"{head}.weight"] - before[f"{head}.weight"]).abs().median() for head in "01"}
    assert float(moved["0"]) == pytest.approx(0.01, rel=1e-3)
    assert float(moved["1"]) == pytest.approx(0.005, rel=1e-3)


def test_dropout_is_the_same_after_a_resume(text: Path, tmp_path: Path) -> None:
    batch = {"sequences": 8, "length": 16, "micro": 4}
    settings: dict[str, Any] = {"objective": {"dropout": 0.5}, "max_steps": 8, "batch": batch, "seed": 3}
    train(toy_recipe(tmp_path / "whole", text, **settings))
    recipe = toy_recipe(tmp_path / "stopped", text, **settings)
    with at_step(3, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train(recipe)
    torch.manual_seed(12345)  # another state of the generator than the run was stopped in
    train(recipe)
    for name, value in heads(tmp_path / "whole").items():
        assert torch.equal(value, heads(tmp_path / "stopped")[name])
    assert log_lines(tmp_path / "whole") == log_lines(tmp_path / "stopped")
    train(toy_recipe(tmp_path / "without", text, **settings | {"objective": {}}))
    assert not torch.equal(heads(tmp_path / "whole")["0.weight"], heads(tmp_path / "without")["0.weight"])


def test_every_step_and_rank_has_a_seed_of_its_own() -> None:
    seeds = {
        loop.generator_seed(seed, step, rank) for seed in range(4) for step in range(20) for rank in range(4)
    }
    assert len(seeds) == 4 * 20 * 4
    assert loop.generator_seed(1, 2, 3) == 12997252459554536576  # the same on every machine


def test_new_heads_depend_on_the_seed_alone(text: Path, tmp_path: Path) -> None:
    """They have to be alike on every rank, whatever was drawn before; here on an existing model."""
    base = train(parse_recipe(recipe_values(tmp_path / "base", text, max_steps=1))) / "export"
    begun = []
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)
        model = {"name_or_path": str(base), "autocast": "float32"}
        train(toy_recipe(tmp_path / str(number), text, seed=seed, max_steps=1, model=model))
        begun.append(ToyHeads.built.heads_before["0.weight"])
    assert torch.equal(begun[0], begun[1])
    assert not torch.equal(begun[0], begun[2])


def test_a_state_that_does_not_fit_is_refused(text: Path, tmp_path: Path) -> None:
    train(toy_recipe(tmp_path / "run", text, max_steps=1))
    objective = ToyHeads.built
    state = {name: value.clone() for name, value in objective.trainable_state().items()}
    with pytest.raises(ValueError, match=r"other parameters than this recipe's: heads\.0\.bias"):
        objective.load_trainable_state({k: v for k, v in state.items() if k != "heads.0.bias"})
    with pytest.raises(ValueError, match=r"other parameters than this recipe's: extra"):
        objective.load_trainable_state(state | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"heads\.0\.bias is \[1\] there, \[16\] here"):
        objective.load_trainable_state(state | {"heads.0.bias": torch.zeros(1)})
