"""What differs between one process, DDP, DeepSpeed's ZeRO and FSDP2; the loop above knows none of them by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from layerskip_model.errors import UserError
from train.config import Recipe
from train.data.batches import cut_for_rank
from train.model import mixed_precision
from train.objectives.base import Objective
from train.processes import is_asked_for


def new_accelerator(recipe: Recipe[Any], ranks: int) -> Accelerator:
    """accelerate's front to the engine that the processes were launched with, set up as the recipe says.

    The launch decides on the engine and how it splits; precision, accumulation and clipping are the recipe's.
    Raises UserError for FSDP's first version.
    """
    # accelerate keeps the first Accelerator's precision for the whole process; a second run may want another.
    AcceleratorState._reset_state()
    rows = recipe.batch.sequences
    parts = cut_for_rank(rows, recipe.batch.micro or rows, rank=0, world=ranks)
    is_fsdp = is_asked_for("FSDP")
    precision = mixed_precision(recipe.model)
    return Accelerator(
        mixed_precision=precision,
        # FSDP2 would keep whole gradients on every rank until the last micro-batch
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=len(parts), sync_each_batch=is_fsdp
        ),
        fsdp_plugin=_fsdp_plugin(precision) if is_fsdp else None,
        deepspeed_plugin=_deepspeed_plugin(recipe, parts, precision) if is_asked_for("DEEPSPEED") else None,
    )


def new_engine(accelerator: Accelerator, objective: Objective[Any], optimizer: Any) -> Engine:
    """Give an objective and its optimizer to the engine of this launch."""
    engines = {DistributedType.FSDP: FullySharded, DistributedType.DEEPSPEED: DeepSpeed}
    return engines.get(accelerator.distributed_type, Engine)(accelerator, objective, optimizer)


def full_size(parameter: nn.Parameter) -> int:
    """Its number of elements, also where DeepSpeed has split it over the ranks already."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin:
    """FSDP2 as the launch asks for it; matrices in bfloat16, sums of gradients and what the forward returns not."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError(
            f"accelerate's fsdp_version: {plugin.fsdp_version} is not supported here; set fsdp_version: 2"
        )
    if precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    return plugin


def _deepspeed_plugin(recipe: Recipe[Any], parts: list[list[int]], precision: str) -> DeepSpeedPlugin:
    """DeepSpeed as the launch asks for it, with the recipe's batch and clipping."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    plugin = DeepSpeedPlugin()
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": max(1, len(parts[0])),
        "train_batch_size": "auto",
        "gradient_accumulation_steps": len(parts),
        "gradient_clipping": recipe.optimizer.clip_norm or 0.0,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW does as well there, and needs no compiler
    }
    if precision == "bf16" and len(parts) > 1:
        plugin.deepspeed_config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    return plugin


class Engine:
    """An objective and its optimizer as one process or DDP run them: every rank holds everything.

    Attributes:
        objective: the module itself.
        module, optimizer: as they are called in training; `module` is the objective inside its wrapper.
        name: of this engine, as checkpoints keep it.
        is_whole: whether every rank holds all parameters, so that one rank alone can run the model.
        is_bound_to_processes: whether only as many processes as have saved can load.
    """

    name: ClassVar[str] = "whole"
    is_whole: ClassVar[bool] = True
    is_bound_to_processes: ClassVar[bool] = False

    def __init__(self, accelerator: Accelerator, objective: Objective[Any], optimizer: Any) -> None:
        self.accelerator = accelerator
        self.objective = objective
        self.module, self.optimizer = accelerator.prepare(objective, optimizer)

    def clip(self, limit: float) -> Tensor | float | None:
        """Scale the gradients down to `limit`, called before the update; their norm before that, if known."""
        return self.accelerator.clip_grad_norm_(self.module.parameters(), limit)

    def whole_state(self) -> dict[str, Tensor] | None:
        """The objective's whole state_dict on the CPU, floating-point tensors in float32. Every rank calls it.

        Only the main process gets it, the others None. Names that share a tensor share it here too. One tensor at
        a time is whole on a device.
        """
        is_main = self.accelerator.is_main_process
        tensors = self.objective.state_dict(keep_vars=True)
        gathered: dict[int, Tensor] = {}
        for tensor in tensors.values():
            if id(tensor) not in gathered:
                with torch.no_grad():
                    whole = self._gathered(tensor).detach()
                    dtype = torch.float32 if whole.is_floating_point() else whole.dtype
                    gathered[id(tensor)] = whole.to("cpu", dtype) if is_main else torch.empty(0)
        return {name: gathered[id(tensor)] for name, tensor in tensors.items()} if is_main else None

    def save(self, directory: Path) -> None:
        """Write what trains and the optimizer's state into a directory that is there. Every rank calls it."""
        if not self.accelerator.is_main_process:
            return
        state = {
            name: tensor.detach().contiguous() for name, tensor in self.objective.trainable_state().items()
        }
        save_file(state, directory / "trainable.safetensors")
        torch.save(self.optimizer.state_dict(), directory / "optimizer.pt")

    def load(self, directory: Path) -> None:
        """Put back what `save` wrote. Every rank calls it; raises what its readers raise for damaged files."""
        self.objective.load_trainable_state(load_file(directory / "trainable.safetensors"))
        state = torch.load(directory / "optimizer.pt", weights_only=True, map_location="cpu")
        self.optimizer.load_state_dict(state)

    def _gathered(self, tensor: Tensor) -> Tensor:
        """A parameter or buffer with all its values. Every rank calls it, in the same order."""
        return tensor


class FullySharded(Engine):
    """FSDP2: each rank holds a slice of every parameter, its gradient and its optimizer state."""

    name = "fsdp2"
    is_whole = False

    def __init__(self, accelerator: Accelerator, objective: Objective[Any], optimizer: Any) -> None:
        # accelerate asks the module it wraps for what only the language model inside knows.
        models = [module for module in objective.modules() if isinstance(module, PreTrainedModel)]
        found: Any = objective
        found._no_split_modules = sorted({name for model in models for name in model._no_split_modules or []})
        found.tie_weights = lambda: [model.tie_weights() for model in models]
        # It tells parameters apart by their addresses; those that it will send here have none yet.
        for parameter in objective.parameters():
            if parameter.is_meta:
                room = torch.empty_like(parameter, device="cpu")  # not written to, so it costs nothing
                torch.utils.swap_tensors(parameter, nn.Parameter(room, parameter.requires_grad))
        with _buffers_left_alone(objective):
            super().__init__(accelerator, objective, optimizer)

    def clip(self, limit: float) -> Tensor | float | None:
        """As Engine.clip; the norm is over all shards."""
        norm: Any = super().clip(limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def save(self, directory: Path) -> None:
        """Each rank writes its slices (torch.distributed.checkpoint)."""
        from torch.distributed.checkpoint import save

        save(self._sharded_state(), checkpoint_id=directory / "shards")

    def load(self, directory: Path) -> None:
        """Each rank reads its slices, on any number of ranks."""
        from torch.distributed.checkpoint import load
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state = self._sharded_state()
        load(state, checkpoint_id=directory / "shards")
        set_state_dict(
            self.module,
            self.optimizer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_trained_only(),
        )

    def _sharded_state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.module, self.optimizer.optimizer, options=_trained_only())
        return {"model": model, "optimizer": optimizer}

    def _gathered(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _trained_only() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(ignore_frozen_params=True, strict=False)


class DeepSpeed(Engine):
    """ZeRO: optimizer state (stage 1), gradients (2) and parameters (3) are split over the ranks.

    In bfloat16 DeepSpeed keeps float32 masters of what trains by itself.
    """

    name = "deepspeed"
    is_whole = False
    is_bound_to_processes = True

    def __init__(self, accelerator: Accelerator, objective: Objective[Any], optimizer: Any) -> None:
        # It told transformers to have models born split; those that are made from now on are one process's own.
        unset_hf_deepspeed_config()
        if accelerator.deepspeed_plugin.hf_ds_config.is_offload():
            for group in optimizer.param_groups:
                group.update({"foreach": False, "fused": True} if "fused" in group else {})
        with _buffers_kept(objective):
            super().__init__(accelerator, objective, optimizer)

    def save(self, directory: Path) -> None:
        """Each rank writes its part, frozen parameters left out."""
        engine: Any = self.module
        engine.save_checkpoint(directory, tag="shards", save_latest=False, exclude_frozen_parameters=True)

    def load(self, directory: Path) -> None:
        """Each rank reads its part; as many ranks as have saved."""
        engine: Any = self.module
        engine.load_checkpoint(directory, tag="shards", load_module_strict=False)

    def _gathered(self, tensor: Tensor) -> Tensor:
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(tensor) if isinstance(tensor, nn.Parameter) else None
        if master is not None:
            return master
        if not hasattr(tensor, "ds_id"):
            return tensor.data
        with zero.GatheredParameters([tensor]):
            return tensor.data.clone()


@contextmanager
def _buffers_left_alone(module: nn.Module) -> Iterator[None]:
    """accelerate splits everything in a state_dict over the ranks, and no buffer can be: they are in none meanwhile.

    Each rank keeps its own, so that they have to be the same on all.
    """
    hidden = [
        (part, name)
        for part in module.modules()
        for name in part._buffers.keys() - part._non_persistent_buffers_set
    ]
    for part, name in hidden:
        part._non_persistent_buffers_set.add(name)
    yield
    for part, name in hidden:
        part._non_persistent_buffers_set.discard(name)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Buffers keep their precision: DeepSpeed rounds them with the parameters, rotary frequencies too."""
    kept = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    yield
    for name, buffer in module.named_buffers():
        if name in kept:
            buffer.data = kept[name].to(buffer.device)
