"""AdamW, or Muon or 8-bit AdamW for the layers' matrices with AdamW for the rest, as one optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from layerskip_model.errors import UserError
from train.objectives.base import Objective
from train.optimizer_config import AdamWConfig, AnyOptimizer, MuonConfig

Group = dict[str, Any]


class TwoOptimizers(torch.optim.Optimizer):
    """Two optimizers that look like one: `matrices` has those of the decoder layers, `rest` everything else."""

    def __init__(self, matrices: torch.optim.Optimizer, rest: torch.optim.Optimizer) -> None:
        # The base class would keep groups and state of its own, which could fall out of step with the parts'.
        self.parts = (matrices, rest)
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """Of both parts, the matrices' first."""
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


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are updated alike: by the optimizer of the layers' matrices or by AdamW."""

    of_matrices: bool  # of Muon or of 8-bit AdamW
    lr: float  # the full rate
    weight_decay: float
    parameters: list[nn.Parameter] = field(default_factory=list)


def parameter_groups(config: AnyOptimizer, objective: Objective[Any]) -> list[ParameterGroup]:
    """What trains, by how it is updated, the matrices' optimizer first. Vectors (norms, biases) get no decay."""
    groups: dict[tuple[bool, float, float], ParameterGroup] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        is_split = hasattr(parameter, "ds_id")  # by DeepSpeed, which makes masters by itself
        if parameter.dtype in (torch.bfloat16, torch.float16) and not is_split:
            raise ValueError(f"{name} trains in {parameter.dtype}; trainable parameters are float32 masters")
        of_matrices = not isinstance(config, AdamWConfig) and is_layer_matrix(name, parameter)
        full = config.adamw_lr if isinstance(config, MuonConfig) and not of_matrices else config.lr
        lr = full * objective.learning_rate_multiple(name)
        shape = getattr(parameter, "ds_shape", parameter.shape)  # that of a parameter DeepSpeed has split
        decay = config.weight_decay if len(shape) >= 2 else 0.0
        group = groups.setdefault((of_matrices, lr, decay), ParameterGroup(of_matrices, lr, decay))
        group.parameters.append(parameter)
    return sorted(groups.values(), key=lambda group: not group.of_matrices)


def build_optimizer(config: AnyOptimizer, objective: Objective[Any]) -> torch.optim.Optimizer:
    """The recipe's optimizer over `parameter_groups`.

    Each group keeps its full learning rate under `full_lr`; the loop sets `lr` from it at every step.
    Raises UserError for Muon and 8-bit AdamW on sharded parameters or without any matrices of layers, and where
    bitsandbytes is not installed.
    """
    groups = parameter_groups(config, objective)
    rest = _as_torch([group for group in groups if not group.of_matrices])
    # torch refuses an empty list of groups, but not an empty group
    nothing: Group = {"params": [], "full_lr": 0.0}
    adamw = torch.optim.AdamW(rest or [nothing], betas=_betas(config), eps=config.eps, fused=True)
    if isinstance(config, AdamWConfig):
        return adamw
    _refuse_sharding(config.kind)
    matrices = _as_torch([group for group in groups if group.of_matrices])
    if not matrices:
        raise UserError(
            f"optimizer.kind: '{config.kind}' is for matrices of decoder layers, and none trains here; "
            "use kind: adamw"
        )
    if isinstance(config, MuonConfig):
        return TwoOptimizers(torch.optim.Muon(matrices, momentum=config.momentum), adamw)
    return TwoOptimizers(bitsandbytes().AdamW8bit(matrices, betas=_betas(config), eps=config.eps), adamw)


def bitsandbytes() -> Any:
    """The optimizers of bitsandbytes. Raises UserError where it is not installed."""
    try:
        from bitsandbytes import optim
    except ImportError:
        raise UserError(
            "optimizer.kind: 'adamw_8bit' needs the bitsandbytes package; pip install bitsandbytes, or use adamw"
        ) from None
    return optim


def _as_torch(groups: list[ParameterGroup]) -> list[Group]:
    return [
        {"params": g.parameters, "lr": g.lr, "full_lr": g.lr, "weight_decay": g.weight_decay} for g in groups
    ]


def _betas(config: AnyOptimizer) -> tuple[float, float]:
    return config.betas[0], config.betas[1]


def _refuse_sharding(kind: str) -> None:
    # The process knows of DeepSpeed, only accelerate's own state of FSDP.
    engines = {PartialState().distributed_type, AcceleratorState._shared_state.get("distributed_type")}
    if engines & {DistributedType.FSDP, DistributedType.DEEPSPEED}:
        raise UserError(
            f"optimizer.kind: '{kind}' needs whole matrices, which FSDP and DeepSpeed shard; use kind: adamw"
        )


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon or 8-bit AdamW takes it: a matrix inside a decoder layer, not an embedding or a head."""
    return parameter.dim() == 2 and not {"layers", "layer"}.isdisjoint(name.split("."))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate is a function of the step: its full rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor
