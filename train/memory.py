"""An estimate of the peak memory of one rank, for every engine, before anything is loaded.

Weights, gradients and optimizer states are arithmetic on the parameters of a model of meta tensors. What the layers
keep for the backward is counted on fake tensors: the model's own forward runs without data, whatever its
architecture, attention or adapters. Nothing is dropped there, so it is an upper bound under layer dropout. What
is not in it: the CUDA context, fragmentation, communication buffers other than those named here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from layerskip_model.head_map import ACCELERATOR_CHUNK_BYTES
from train.config import Recipe
from train.model import mixed_precision
from train.objectives.base import Objective
from train.optimizer import parameter_groups

ENGINES = ("one process", "DDP", "ZeRO-2", "ZeRO-2 + offload", "ZeRO-3", "ZeRO-3 + offload", "FSDP2")
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256, "muon": 4.0}
"""Bytes of optimizer state for an element of a layer's matrix; everything else has AdamW's."""
UNMASKED = "sdpa_without_mask"
BUCKET = 500_000_000  # elements that DeepSpeed reduces or gathers at once, by default
LIVE = 1_000_000_000  # elements of gathered parameters that ZeRO-3 keeps, by default


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank on one engine; `host` is what offloading puts into the memory of the CPU.

    The peak is less than the sum: activations shrink while the gradients of a step grow.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    peak: float
    host: float = 0.0


@dataclass(frozen=True)
class Needs:
    """What the estimate reads of a recipe and its model.

    Attributes:
        trained, frozen: parameters; trained ones are float32.
        frozen_bytes: of one frozen parameter.
        states: bytes of the optimizer's states.
        compute: bytes of a number in the matmuls.
        layer: parameters of the largest decoder layer.
        copies: elements of the layers' float32 matrices that train and that autocast copies.
        vocabulary: parameters of the LM head; `outer` those outside the decoder layers.
        head_trains, tied: whether the head has a gradient, and whether the embedding is the same parameter.
        head_is_copied: whether autocast would copy it, unless the engine has cast it.
        saved, saved_cast: bytes that a forward keeps, with float32 weights under autocast and with cast weights.
        hidden: elements that leave a layer; `layers` their number, none where all are frozen.
        exits: losses over the vocabulary at once.
        accumulates: whether gradients of earlier micro-batches are there in a forward.
        chunk: bytes of the float32 logits that a loss makes at once, and `has_softcap` whether it needs them twice.
    """

    trained: int
    frozen: int
    frozen_bytes: int
    states: float
    compute: int
    layer: int
    copies: int
    vocabulary: int
    outer: int
    head_trains: bool
    tied: bool
    head_is_copied: bool
    saved: int
    saved_cast: int
    hidden: int
    layers: int
    exits: int
    accumulates: bool
    chunk: int
    has_softcap: bool

    @classmethod
    def of(
        cls,
        recipe: Recipe[Any],
        objective: Objective[Any],
        model: PreTrainedModel,
        *,
        micro: int,
        accumulates: bool,
        chunk: int = ACCELERATOR_CHUNK_BYTES,
    ) -> Needs:
        """Of an objective around a `model` of meta tensors, for micro-batches of `micro` sequences.

        `chunk`: bytes of logits that a loss holds at once, see layerskip_model.head_map.
        """
        autocast = mixed_precision(recipe.model) == "bf16"
        layers = model.get_decoder().layers
        head: Any = model.get_output_embeddings()
        embedding: Any = model.get_input_embeddings()
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        matrices = [
            m.weight
            for m in layers.modules()
            if isinstance(m, nn.Linear) and m.weight.dtype == torch.float32 and autocast
        ]
        frozen = [p for p in objective.parameters() if not p.requires_grad]
        length = recipe.batch.length
        compute = 2 if autocast or model.dtype == torch.bfloat16 else 4
        apart = recipe.data.documents == "separate"
        saved = [
            saved_bytes(model, micro, length, autocast=autocast, cast=cast, masked=apart)
            for cast in (False, True)
        ]
        beside = saved_beside(objective, micro, length, autocast=autocast)
        return cls(
            trained=sum(p.numel() for p in objective.parameters() if p.requires_grad),
            frozen=sum(p.numel() for p in frozen),
            frozen_bytes=frozen[0].element_size() if frozen else 4,
            states=sum(
                p.numel()
                * (STATE_BYTES[recipe.optimizer.kind] if group.of_matrices else STATE_BYTES["adamw"])
                for group in parameter_groups(recipe.optimizer, objective)
                for p in group.parameters
            ),
            compute=compute,
            layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
            copies=sum(p.numel() for p in matrices if p.requires_grad),
            vocabulary=head.weight.numel(),
            outer=sum(p.numel() for p in model.parameters() if p not in inside),
            head_trains=head.weight.requires_grad,
            tied=head.weight is embedding.weight,
            head_is_copied=autocast and head.weight.dtype == torch.float32,
            saved=saved[0] + beside,
            saved_cast=saved[1] + beside,
            hidden=micro * length * model.config.get_text_config().hidden_size,
            layers=len(layers) if any(p.requires_grad for p in inside) else 0,
            exits=exits_at_once(recipe, objective),
            accumulates=accumulates,
            chunk=min(chunk, 4 * micro * length * head.weight.shape[0]),
            has_softcap=getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None,
        )

    def loss(self, *, cast: bool) -> float:
        """Bytes of the losses over the vocabulary: one gradient of the head, its copy, a chunk, each exit's states."""
        head = 4 * self.vocabulary * self.head_trains
        copy = 2 * self.vocabulary if self.head_is_copied and not cast else 0
        buffers = 2.0 + self.has_softcap + 0.5 * (self.compute == 2)  # of a chunk of logits in float32
        return head + copy + buffers * self.chunk + self.exits * self.hidden * self.compute

    def activations(self, *, checkpointing: bool, cast: bool) -> tuple[float, float]:
        """Bytes that the layers keep at the end of a forward, and those of the one layer that a backward is in."""
        kept = self.saved_cast if cast else self.saved
        if not checkpointing:
            return kept, kept / max(1, self.layers)
        # Autocast keeps its copies of what trains until the forward is over.
        states = self.layers * self.hidden * (self.compute if cast else 4)
        if not self.layers:  # nothing that is kept is the model's
            return kept, kept
        return states + (0 if cast else 2 * self.copies), kept / self.layers


def estimate(needs: Needs, engine: str, ranks: int, *, checkpointing: bool) -> Estimate:
    """The peak of one of ENGINES over so many ranks. ZeRO with bfloat16 casts the weights and keeps float32 masters."""
    n = needs
    zero, fsdp, offload = engine.startswith("ZeRO"), engine == "FSDP2", "offload" in engine
    own = n.compute if zero else 4  # bytes of a trained weight and its gradient
    frozen_own = n.compute if zero else n.frozen_bytes
    shards = ranks if fsdp or engine.startswith("ZeRO-3") else 1
    weights = (own * n.trained + frozen_own * n.frozen) / shards
    if fsdp:  # the outer parameters stay gathered, two layers at a time come and go
        weights += n.compute * (n.outer + 2 * n.layer)
    elif shards > 1:
        weights += n.compute * min(LIVE, n.trained + n.frozen)
    gradients = own * n.trained / (ranks if zero or fsdp else 1)
    states = n.states / (ranks if zero or fsdp else 1)
    buffers = 0.0
    if engine == "DDP":
        buffers = 4.0 * n.trained
    elif zero:
        states += 4.0 * n.trained / ranks  # masters
        buffers = n.compute * min(BUCKET, n.trained)
    elif fsdp:
        buffers = 4.0 * n.layer
    step = 4.0 * n.trained / ranks if zero else 0.0  # gradients in float32
    host = 0.0
    if offload:
        host, states, gradients, step = states + step + gradients, 0.0, 0.0, 0.0
    cast = (zero or fsdp) and n.compute == 2
    kept, one_layer = n.activations(checkpointing=checkpointing, cast=cast)
    kept += n.loss(cast=cast)
    # The gradients of a tied embedding and head are there beside their sum.
    tied = 8.0 * n.vocabulary * (n.tied and n.head_trains)
    forward = kept + (gradients if n.accumulates else 0.0)
    backward = gradients + max(one_layer + tied, step)
    return Estimate(
        weights=weights,
        gradients=gradients + buffers,
        optimizer=states,
        activations=kept,
        peak=weights + buffers + states + max(forward, backward),
        host=host,
    )


def saved_bytes(
    model: PreTrainedModel, micro: int, length: int, *, autocast: bool, cast: bool, masked: bool
) -> int:
    """Bytes that a forward of [micro, length] tokens keeps for its backward, besides the weights.

    Counted on fake tensors, without activation checkpointing. `cast`: the weights are in bfloat16, if `autocast`.
    `masked`: sdpa has a mask in every layer, as where documents are kept apart.
    """
    fake: Any = copy.deepcopy(model)
    attention = model.config._attn_implementation
    if attention.startswith("flash") or (attention == "sdpa" and not masked):
        # On fake tensors transformers always makes a mask. And flash attention keeps what sdpa does without one.
        AttentionInterface.register(UNMASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(UNMASKED, lambda *args, **kwargs: None)
        fake.config._attn_implementation = UNMASKED
    if autocast and cast:
        fake = fake.to(torch.bfloat16)

    def run(model: Any) -> Any:
        return model.get_decoder()(input_ids=torch.zeros(micro, length, dtype=torch.long), use_cache=False)

    return _saved(fake, run, autocast)


def saved_beside(objective: Objective[Any], micro: int, length: int, *, autocast: bool) -> int:
    """Bytes that what trains beside a frozen model keeps, as far as the objective tells it."""
    return _saved(copy.deepcopy(objective), lambda fake: fake.run_beside(micro, length), autocast)


def _saved(fake: Any, run: Callable[[Any], Any], autocast: bool) -> int:
    """What a run of a module of meta tensors keeps for its backward, besides the weights."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = fake.to_empty(device="cpu").train()
        for module in fake.modules():
            vars(module).pop("forward", None)  # of an objective around the model
            module.gradient_checkpointing = False
        weights = {tensor.untyped_storage()._cdata for tensor in [*fake.parameters(), *fake.buffers()]}
        kept: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            made = run(fake)
        found = sum(storage.nbytes() for storage in kept.values())
        del made  # not before: what it keeps is only there while it is
        return found


def exits_at_once(recipe: Recipe[Any], objective: Objective[Any]) -> int:
    """The most losses over the vocabulary in one step."""
    total = recipe.max_steps or 1
    steps = range(0, total, max(1, total // 200))
    weights = (objective.schedule(step).get("exit_weight", [1.0]) for step in [*steps, total - 1])
    return max(sum(weight > 0.0 for weight in each) for each in weights)
