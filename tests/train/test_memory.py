"""The estimate of memory against what steps of small models take, counted tensor by tensor."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from layerskip_model.formats.huggingface import new_model
from layerskip_model.head_map import CPU_CHUNK_BYTES
from layerskip_model.lora import add_lora
from train.config import Recipe, parse_recipe
from train.live_bytes import LiveBytes
from train.memory import ENGINES, Needs, estimate, saved_bytes
from train.model import enable_checkpointing, outline_model
from train.objectives import OBJECTIVES
from train.optimizer import build_optimizer

MICRO, LENGTH = 4, 64
LORA = {"rank": 4}


def recipe(
    kind: str = "llama", *, micro: int = MICRO, optimizer: str = "adamw", every: int = 3, **changes: Any
) -> Recipe[Any]:
    """A LayerSkip recipe over a model of 6 layers; `changes` go to the model's section and its config."""
    model_keys = ("lora", "autocast", "activation_checkpointing", "attn_implementation")
    config = {
        "model_type": kind,
        "num_hidden_layers": 6,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": 1000,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    model = {key: changes.pop(key) for key in model_keys if key in changes}
    learning = {"kind": optimizer, "lr": 0.001} | ({"adamw_lr": 0.001} if optimizer == "muon" else {})
    return parse_recipe(
        {
            "output_dir": "out",
            "max_steps": 30,
            "batch": {"sequences": 2 * micro, "length": LENGTH, "micro": micro},
            "model": {"config": config | changes, "tokenizer": {"train": {"vocab_size": 280}}}
            | {"autocast": "float32"}
            | model,
            "data": {"train": [{"kind": "stdlib"}], "documents": "joined"},
            "objective": {"kind": "layerskip", "early_exit": {"curriculum": "rotational", "every": every}},
            "optimizer": learning,
        }
    )


def needs_of(given: Recipe[Any], accumulates: bool = False) -> Needs:
    model = outline_model(given.model)
    objective = OBJECTIVES["layerskip"].build(given, model)
    micro = given.batch.micro or 0
    return Needs.of(given, objective, model, micro=micro, accumulates=accumulates, chunk=CPU_CHUNK_BYTES)


def measured(given: Recipe[Any], micro_batches: int = 1) -> int:
    """Peak bytes over a rotation of steps, after one that gives the optimizer its states."""
    assert given.model.config is not None
    model = new_model(given.model.config, attn_implementation=given.model.attn_implementation)
    if given.model.lora is not None:
        add_lora(model, **given.model.lora.model_dump())
    if given.model.activation_checkpointing:
        enable_checkpointing(model)
    objective = OBJECTIVES["layerskip"].build(given, model).train()
    optimizer = build_optimizer(given.optimizer, objective)
    micro = given.batch.micro or 0

    def step(number: int) -> None:
        for _ in range(micro_batches):
            tokens = torch.randint(1000, (micro, LENGTH))
            batch = {"input_ids": tokens, "labels": tokens, "row": list(range(micro))}
            with torch.autocast("cpu", torch.bfloat16, enabled=given.model.autocast == "bfloat16"):
                loss, _ = objective(batch, number, {"tokens": 1.0})
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    gc.collect()
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [*model.parameters(), *model.buffers(), *(v for v in states if isinstance(v, torch.Tensor))]
    with LiveBytes(tensors) as live:
        for number in range(1, 4):
            step(number)
    return live.peak


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_checkpointing": True},
        {"autocast": "bfloat16"},
        {"autocast": "bfloat16", "activation_checkpointing": True},
        {"attn_implementation": "eager"},
        {"lora": LORA},
        {"lora": LORA, "autocast": "bfloat16", "activation_checkpointing": True},
        {"optimizer": "muon"},
        {"micro": 1},
        {"kind": "qwen3", "tie_word_embeddings": True, "vocab_size": 8000, "every": 5},
        {"kind": "gemma2", "attn_implementation": "eager", "autocast": "bfloat16"},
    ],
    ids=str,
)
def test_the_estimate_is_near_what_is_measured(changes: dict[str, Any]) -> None:
    given = recipe(**changes)
    expected = estimate(needs_of(given), "one process", 1, checkpointing=given.model.activation_checkpointing)
    assert expected.peak == pytest.approx(measured(given), rel=0.08)


def test_accumulated_gradients_are_there_during_a_forward() -> None:
    given = recipe()
    one, two = (estimate(needs_of(given, on), "one process", 1, checkpointing=False) for on in (False, True))
    assert two.peak == pytest.approx(measured(given, 2), rel=0.08)
    assert two.peak - one.peak == one.gradients


def test_what_layers_keep_is_what_autograd_saves() -> None:
    given = recipe()
    assert given.model.config is not None
    model = new_model(given.model.config)
    weights = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.model(torch.zeros(3, 50, dtype=torch.long), use_cache=False)
    assert states is not None
    outline = outline_model(given.model)
    naive = sum(storage.nbytes() for storage in kept.values())
    assert saved_bytes(outline, 3, 50, autocast=False, cast=False, masked=False) == naive
    assert saved_bytes(outline, 3, 50, autocast=False, cast=False, masked=True) >= naive + 6 * 4 * 3 * 50**2


def test_engines_share_what_they_shard() -> None:
    """Bytes a parameter: 16 with AdamW in float32, 12 of them on every rank only without sharding."""
    needs = needs_of(recipe(hidden_size=512, intermediate_size=2048, autocast="bfloat16"))
    parameters = needs.trained

    def of(engine: str, ranks: int) -> Any:
        return estimate(needs, engine, ranks, checkpointing=False)

    one = of("one process", 1)
    assert (one.weights, one.gradients, one.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert of("DDP", 8).peak == one.peak + 4 * parameters  # its buckets
    assert of("ZeRO-2", 8).weights == 2 * parameters
    assert of("ZeRO-2", 8).optimizer == 12 * parameters / 8
    assert of("ZeRO-2 + offload", 8).optimizer == 0.0
    assert of("ZeRO-2 + offload", 8).host > 12 * parameters / 8
    assert of("FSDP2", 8).optimizer == 8 * parameters / 8
    for engine in ENGINES[2:]:
        peaks = [of(engine, ranks).peak for ranks in (2, 8, 64)]
        assert peaks == sorted(peaks, reverse=True), engine
    for engine in ENGINES:
        kept, recomputed = (estimate(needs, engine, 2, checkpointing=on).peak for on in (False, True))
        assert recomputed <= kept


def test_adapters_and_8_bit_states_are_small() -> None:
    plain, lora = needs_of(recipe()), needs_of(recipe(lora=LORA))
    assert lora.trained < 0.1 * plain.trained
    assert lora.trained + lora.frozen > plain.trained
    assert not lora.head_trains
    eight = needs_of(recipe(optimizer="adamw_8bit"))
    matrices = 6 * (96 * 96 * 2 + 96 * 48 * 2 + 3 * 96 * 256)
    assert plain.states - eight.states == pytest.approx(matrices * (8 - 2 - 8 / 256))


def test_live_bytes_counts_what_is_alive() -> None:
    first = torch.zeros(100)  # 400 bytes
    with LiveBytes([first, first.view(10, 10)]) as live:
        second = first + 1.0
        assert live.now == 800
        third = second.view(-1)
        assert live.now == 800
        del second
        assert live.now == 800
        del third
        assert live.now == 400
    assert live.peak == 800
