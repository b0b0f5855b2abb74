"""AdamW, and Muon with AdamW for the rest, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn

from layerskip_model.errors import UserError
from train.config import AdamWConfig, MuonConfig
from train.objectives import Objective

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
    Raises UserError for Muon on sharded parameters, which it cannot orthogonalise.
    """
    if isinstance(config, AdamWConfig):
        adamw_lr = config.lr
    else:
        adamw_lr = config.adamw_lr
        sharded = {DistributedType.FSDP, DistributedType.DEEPSPEED}
        if PartialState().distributed_type in sharded:
            raise UserError(
                "optimizer.kind: 'muon' needs whole matrices, which FSDP and DeepSpeed shard; use kind: adamw"
            )
    muon_groups: list[Group] = []
    adamw_groups: dict[tuple[float, bool], Group] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        multiple = objective.learning_rate_multiple(name)
        if isinstance(config, MuonConfig) and is_layer_matrix(name, parameter):
            lr = config.lr * multiple
            muon_groups.append({"params": [parameter], "lr": lr, "full_lr": lr})
            continue
        lr, decays = adamw_lr * multiple, parameter.dim() >= 2
        decay = config.weight_decay if decays else 0.0
        group = adamw_groups.setdefault(
            (lr, decays), {"params": [], "lr": lr, "full_lr": lr, "weight_decay": decay}
        )
        group["params"].append(parameter)
    betas = (config.betas[0], config.betas[1])
    adamw = torch.optim.AdamW(list(adamw_groups.values()), betas=betas, eps=config.eps)
    if isinstance(config, AdamWConfig):
        return adamw
    muon = torch.optim.Muon(muon_groups, momentum=config.momentum, weight_decay=config.weight_decay)
    return MuonWithAdamW(muon, adamw)


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes it: a matrix inside a decoder layer, not an embedding or a head."""
    return parameter.dim() == 2 and ".layers." in name


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate is a function of the step: its full rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor
