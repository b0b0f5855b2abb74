from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from layerskip_model.errors import UserError
from train.objectives import Objective
from train.optimizer import TwoOptimizers, build_optimizer, set_learning_rate
from train.optimizer_config import AdamW8bitConfig, AdamWConfig, MuonConfig

ADAMW = AdamWConfig(kind="adamw", lr=0.01, weight_decay=0.3)
MUON = MuonConfig(kind="muon", lr=0.05, adamw_lr=0.02, weight_decay=0.2, momentum=0.8)


class Toy(Objective[Any]):
    """Parameters of every sort, and a loss that reaches all of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def learning_rate_multiple(self, name: str) -> float:
        return 3.0 if name.startswith(("head", "model.layers.1")) else 1.0

    def loss(self, step: int) -> Tensor:
        hidden = self.embed(torch.tensor([step % 7, 3]))  # [2, 4]
        for layer in self.model.layers:  # type: ignore[union-attr]
            hidden = hidden + layer(self.frozen(hidden)).tanh()
        return nn.functional.cross_entropy(self.head(self.norm(hidden)), torch.tensor([1, 2]))

    build = count = forward = export = suggestion = None  # type: ignore[assignment]


Toy.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def parameters_by_name(objective: Toy) -> dict[str, nn.Parameter]:
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


def run(objective: Toy, optimizers: list[Any], steps: range) -> None:
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        objective.loss(step).backward()
        for optimizer in optimizers:
            optimizer.step()


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    for (name, ours), theirs in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


MATRICES = ["model.layers.0.weight", "model.layers.1.weight"]


def test_groups_say_what_each_parameter_gets() -> None:
    objective = Toy()
    names = {parameter: name for name, parameter in objective.named_parameters()}
    for config in (ADAMW, MUON):
        optimizer = build_optimizer(config, objective)
        got = {
            names[parameter]: (group["lr"], group["full_lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        expected = {}
        for name, parameter in parameters_by_name(objective).items():
            lr = config.lr if config is ADAMW or name in MATRICES else MUON.adamw_lr
            lr *= 3.0 if name.startswith(("head", "model.layers.1")) else 1.0
            decay = config.weight_decay if parameter.dim() == 2 else 0.0
            expected[name] = (lr, lr, decay)
        assert got == expected
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(expected)


def two_optimizers(objective: Toy) -> list[Any]:
    """What MUON says, with nothing of ours: Muon over the matrices, AdamW over the rest."""
    p = parameters_by_name(objective)
    muon = torch.optim.Muon(
        [{"params": [p[MATRICES[0]]], "lr": 0.05}, {"params": [p[MATRICES[1]]], "lr": 0.15}],
        weight_decay=0.2,
        momentum=0.8,
    )
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    adamw = torch.optim.AdamW(
        [
            {"params": [p["embed.weight"]], "lr": 0.02, "weight_decay": 0.2},
            {"params": [p["head.weight"]], "lr": 0.06, "weight_decay": 0.2},
            {"params": [p["model.layers.1.bias"]], "lr": 0.06, "weight_decay": 0.0},
            {
                "params": [p[name] for name in ("model.layers.0.bias", "norm.weight", "norm.bias")],
                "lr": 0.02,
                "weight_decay": 0.0,
            },
        ],
        **settings,  # type: ignore[arg-type]
    )
    return [muon, adamw]


def test_one_optimizer_equals_two_step_by_step() -> None:
    ours, theirs = Toy(), Toy()
    one, two = build_optimizer(MUON, ours), two_optimizers(theirs)
    for step in range(5):
        run(ours, [one], range(step, step + 1))
        run(theirs, two, range(step, step + 1))
        assert_equal(ours, theirs)
    assert not torch.equal(ours.head.weight, Toy().head.weight)
    assert torch.equal(ours.frozen.weight, Toy().frozen.weight)


def test_adamw_equals_torch_s() -> None:
    ours, theirs = Toy(), Toy()
    p = parameters_by_name(theirs)
    plain = torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "lr": 0.03 if name.startswith(("head", "model.layers.1")) else 0.01,
                "weight_decay": 0.3 if parameter.dim() == 2 else 0.0,
            }
            for name, parameter in p.items()
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    run(ours, [build_optimizer(ADAMW, ours)], range(5))
    run(theirs, [plain], range(5))
    assert_equal(ours, theirs)


def test_the_schedule_s_factor_scales_every_group_s_full_rate() -> None:
    optimizer = build_optimizer(MUON, Toy())
    full = [group["lr"] for group in optimizer.param_groups]
    for factor in (0.5, 0.0, 1.0, 0.25):  # of the full rate each time, not of the last one
        set_learning_rate(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [rate * factor for rate in full]
    parts = optimizer.parts  # type: ignore[attr-defined]
    assert parts[0].param_groups[0]["lr"] == 0.05 * 0.25  # the parts' own groups


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "accelerate"])
def test_state_goes_through_a_file(tmp_path: Path, config: AdamWConfig | MuonConfig, wrapped: bool) -> None:
    def prepared(objective: Toy) -> Any:
        optimizer = build_optimizer(config, objective)
        return Accelerator(cpu=True).prepare(optimizer) if wrapped else optimizer

    whole = Toy()
    optimizer = prepared(whole)
    run(whole, [optimizer], range(3))
    set_learning_rate(optimizer, 0.5)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = copy.deepcopy(whole)
    run(whole, [optimizer], range(3, 6))

    again = prepared(resumed)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    rates = [group["lr"] for group in optimizer.param_groups]
    assert [group["lr"] for group in again.param_groups] == rates
    run(resumed, [again], range(3, 6))
    assert_equal(whole, resumed)


def test_state_of_the_other_kind_or_another_model_is_refused() -> None:
    states = [build_optimizer(config, Toy()).state_dict() for config in (ADAMW, MUON)]
    for config, state in ((ADAMW, states[1]), (MUON, states[0])):
        with pytest.raises((KeyError, ValueError)):
            build_optimizer(config, Toy()).load_state_dict(state)


def test_it_looks_like_one_optimizer() -> None:
    objective = Toy()
    optimizer = build_optimizer(MUON, objective)
    assert isinstance(optimizer, TwoOptimizers)
    assert isinstance(optimizer, torch.optim.Optimizer)
    run(objective, [optimizer], range(1))
    assert set(optimizer.state) == set(parameters_by_name(objective).values())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in objective.parameters())


@pytest.mark.parametrize("engine", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_muon_is_refused_where_matrices_are_sharded(
    monkeypatch: pytest.MonkeyPatch, engine: DistributedType
) -> None:
    PartialState(cpu=True)
    keeper = AcceleratorState if engine == DistributedType.FSDP else PartialState
    monkeypatch.setitem(keeper._shared_state, "distributed_type", engine)
    with pytest.raises(UserError, match=r"^optimizer\.kind: 'muon' needs whole matrices.*use kind: adamw$"):
        build_optimizer(MUON, Toy())
    build_optimizer(ADAMW, Toy())


def test_muon_needs_matrices_in_layers_and_nothing_else() -> None:
    objective = Toy()
    objective.model.requires_grad_(False)
    with pytest.raises(UserError, match=r"^optimizer\.kind: 'muon' is for matrices of decoder layers"):
        build_optimizer(MUON, objective)
    only = Toy().requires_grad_(False)
    only.model.layers[0].weight.requires_grad_()  # type: ignore[index, union-attr]
    optimizer = build_optimizer(MUON, only)
    set_learning_rate(optimizer, 0.5)
    run(only, [optimizer], range(1))
    assert not torch.equal(only.model.layers[0].weight, Toy().model.layers[0].weight)  # type: ignore[index, union-attr]


def test_trainable_parameters_are_float32_masters() -> None:
    objective = Toy()
    objective.frozen.to(torch.bfloat16)
    build_optimizer(ADAMW, objective)
    objective.head.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"^head\.weight trains in torch\.bfloat16"):
        build_optimizer(ADAMW, objective)


EIGHT = AdamW8bitConfig(kind="adamw_8bit", lr=0.01, weight_decay=0.3)


def test_8_bit_is_for_the_layers_matrices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import train.optimizer

    monkeypatch.setattr(train.optimizer, "bitsandbytes", lambda: SimpleNamespace(AdamW8bit=torch.optim.AdamW))
    objective = Toy()
    names = {parameter: name for name, parameter in objective.named_parameters()}
    optimizer = build_optimizer(EIGHT, objective)
    assert isinstance(optimizer, TwoOptimizers)
    eight, rest = (
        {names[p]: group["weight_decay"] for group in part.param_groups for p in group["params"]}
        for part in optimizer.parts
    )
    assert eight == dict.fromkeys(MATRICES, 0.3)
    assert set(rest) == set(parameters_by_name(objective)) - set(MATRICES)
    assert {name for name, decay in rest.items() if decay} == {"embed.weight", "head.weight"}
    assert {group["full_lr"] for group in optimizer.param_groups} == {0.01, 0.03}


def test_8_bit_without_its_package_or_on_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=r"^optimizer\.kind: 'adamw_8bit' needs the bitsandbytes package; pip"
    ):
        build_optimizer(EIGHT, Toy())
    PartialState(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(UserError, match=r"^optimizer\.kind: 'adamw_8bit' needs whole matrices"):
        build_optimizer(EIGHT, Toy())


def test_8_bit_states_go_through_a_file(tmp_path: Path) -> None:

    def wide() -> Toy:
        objective = Toy()
        layers: Any = objective.model.layers
        for layer in layers:  # bitsandbytes leaves fewer than 4096 elements in 32 bits
            layer.large = nn.Linear(64, 128, bias=False)
        return objective

    def steps(objective: Toy, optimizer: Any, numbers: range) -> None:
        layers: Any = objective.model.layers
        for step in numbers:
            optimizer.zero_grad()
            large = sum(
                (layer.large(torch.ones(64) * step).square().sum() for layer in layers), torch.zeros(())
            )
            (objective.loss(step) + large).backward()
            optimizer.step()

    torch.manual_seed(0)
    whole = wide()
    optimizer: Any = build_optimizer(EIGHT, whole)
    steps(whole, optimizer, range(3))
    states = [state["state1"].dtype for state in optimizer.parts[0].state.values()]
    assert states.count(torch.uint8) == 2
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = copy.deepcopy(whole)
    steps(whole, optimizer, range(3, 6))
    again = build_optimizer(EIGHT, resumed)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(resumed, again, range(3, 6))
    assert_equal(whole, resumed)
