"""AdamW, and Muon with AdamW for the rest, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from layerskip_model.errors import UserError
from train.objectives import Objective
from train.optimizer_config import AdamWConfig, MuonConfig

Group = dict[str, Any]


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers that look like one: `muon` has the matrices, `adamw` everything else."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        # The base class would keep groups and state of its own, which could fall out of step with the parts'.
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """Of both parts, Muon's first."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """Of both parts, by parameter."""
        return {key: value for part in self.parts for key, value in part.state.items()}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters."""
        assert closure is None
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Both parts' state."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put both parts' state back."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def build_optimizer(config: AdamWConfig | MuonConfig, objective: Objective[Any]) -> torch.optim.Optimizer:
    """The recipe's optimizer over what trains. Vectors (norms, biases) get no weight decay.

    Each group keeps its full learning rate under `full_lr`; the loop sets `lr` from it at every step.
    Raises UserError for Muon on sharded parameters, which it cannot orthogonalise, or without any matrices.
    """
    if isinstance(config, MuonConfig):
        _refuse_sharding()
    groups: dict[tuple[bool, float, float], Group] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"{name} trains in {parameter.dtype}; trainable parameters are float32 masters")
        for_muon = isinstance(config, MuonConfig) and is_layer_matrix(name, parameter)
        full = config.lr if for_muon or isinstance(config, AdamWConfig) else config.adamw_lr
        lr = full * objective.learning_rate_multiple(name)
        decay = config.weight_decay if parameter.dim() >= 2 else 0.0
        group = {"params": [], "lr": lr, "full_lr": lr, "weight_decay": decay}
        groups.setdefault((for_muon, lr, decay), group)["params"].append(parameter)
    adamw_groups = [group for (for_muon, *_), group in groups.items() if not for_muon]
    muon_groups = [group for (for_muon, *_), group in groups.items() if for_muon]
    if isinstance(config, AdamWConfig):
        return _adamw(config, adamw_groups)
    if not muon_groups:
        raise UserError(
            "optimizer.kind: 'muon' is for matrices of decoder layers, and none trains here; use kind: adamw"
        )
    return MuonWithAdamW(
        torch.optim.Muon(muon_groups, momentum=config.momentum), _adamw(config, adamw_groups)
    )


def _adamw(config: AdamWConfig | MuonConfig, groups: list[Group]) -> torch.optim.AdamW:
    # torch refuses an empty list of groups, but not an empty group
    nothing: Group = {"params": [], "full_lr": 0.0}
    return torch.optim.AdamW(groups or [nothing], betas=(config.betas[0], config.betas[1]), eps=config.eps)


def _refuse_sharding() -> None:
    # The process knows of DeepSpeed, only accelerate's own state of FSDP.
    engines = {PartialState().distributed_type, AcceleratorState._shared_state.get("distributed_type")}
    if engines & {DistributedType.FSDP, DistributedType.DEEPSPEED}:
        raise UserError(
            "optimizer.kind: 'muon' needs whole matrices, which FSDP and DeepSpeed shard; use kind: adamw"
        )


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes it: a matrix inside a decoder layer, not an embedding or a head."""
    return parameter.dim() == 2 and ".layers." in name


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate is a function of the step: its full rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor
