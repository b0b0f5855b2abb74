"""Run by torchrun: an EarlyExitModel's step under FSDP2 and DDP against the same step in one process.

Prints one line per engine when all is equal and raises where it is not.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from layerskip_model.early_exit import EarlyExitModel, ExitLoss
from layerskip_model.layer_dropout import LayerDropout
from layerskip_model.processes import leave
from tests.tiny_models import tiny_model

PER_RANK = 2
ROWS = 2 * PER_RANK
TOLERANCE = 1e-6  # norms of float64 models compute in float32


def build(tied: bool) -> EarlyExitModel:
    exit_loss = ExitLoss(4, 40, [1, 2, 3, 4], "linear", e_scale=1.0, curriculum="none", every=1)
    dropout = LayerDropout(0.6, "linear", "constant", "all", num_layers=4, total_steps=40, seed=1)
    return EarlyExitModel(tiny_model(tie_word_embeddings=tied), exit_loss, dropout).train()


def interesting_step(dropout: LayerDropout) -> int:
    """A step at which one layer is idle on one rank only, and another layer on both."""
    for step in range(4000):
        kept = dropout.kept(step, range(ROWS))
        idle = [~kept[:, :PER_RANK].any(axis=1), ~kept[:, PER_RANK:].any(axis=1)]
        if (idle[0] & idle[1]).any() and (idle[0] ^ idle[1]).any():
            return step
    raise AssertionError("no such step")


def full(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def compare(engine: str, *, tied: bool, checkpointing: bool) -> None:
    rank = dist.get_rank()
    tokens = torch.randint(64, (ROWS, 9), generator=torch.Generator().manual_seed(2))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    alone = build(tied)
    assert alone.dropout is not None
    step = interesting_step(alone.dropout)
    expected = alone(inputs, labels, range(ROWS), step).weighted_sum()
    expected.backward()

    module = build(tied)
    if checkpointing:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    module.model.model.layers[0].input_layernorm.register_forward_hook(lambda *args: calls.append(1))
    wrapped: nn.Module = module
    if engine == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for layer in module.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
    else:
        wrapped = DistributedDataParallel(module)
    own = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    rows = list(range(ROWS))[own]
    for _ in range(2):  # a second step meets what the first left behind
        wrapped.zero_grad()
        loss = wrapped(inputs[own], labels[own], rows, step).weighted_sum()
        (loss * 2).backward()  # both engines average over the two ranks
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=TOLERANCE, atol=0)
    for (name, left), (_, right) in zip(module.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(full(left.grad), full(right.grad), rtol=1e-5, atol=TOLERANCE), name
    assert len(calls) == (4 if checkpointing else 2)
    module.eval()
    wrapped(inputs[own], labels[own], rows, step)
    if rank == 0:
        print(f"{engine} tied={tied} checkpointing={checkpointing}: equal", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for engine in sys.argv[1:]:
        compare(engine, tied=False, checkpointing=False)
        compare(engine, tied=True, checkpointing=True)
    leave(0)


if __name__ == "__main__":
    main()
