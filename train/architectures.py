"""Real architectures with random weights: one training step of each, and the memory that runs of any size would take.

    python -m train.architectures step llama-3.2-1b --length 512
    python -m train.architectures table --ranks 8

The configurations are those that the models are published with; no weights and no network are needed.
"""

from __future__ import annotations

import gc
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, PreTrainedModel

from layerskip_model.command_line import run_app
from layerskip_model.errors import UserError
from layerskip_model.head_map import ACCELERATOR_CHUNK_BYTES, CPU_CHUNK_BYTES
from layerskip_model.lora import add_lora
from train.config import Recipe, parse_recipe
from train.live_bytes import LiveBytes
from train.memory import Estimate, Needs, estimate
from train.model import enable_checkpointing, mixed_precision, outline_model
from train.objectives import OBJECTIVES
from train.objectives.base import Objective
from train.optimizer import build_optimizer

GIB = 2**30
_LLAMA3_ROPE = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    usual = {"vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    return {"model_type": "llama"} | sizes | attention | usual | others


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama(
        16,
        2048,
        8192,
        32,
        8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters=_LLAMA3_ROPE,
        tie_word_embeddings=True,
    ),
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "num_hidden_layers": 26,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": _llama(32, 4096, 11008, 32, 32),
    "llama-3-8b": _llama(32, 4096, 14336, 32, 8, vocab_size=128256, max_position_embeddings=8192),
    "llama-2-13b": _llama(40, 5120, 13824, 40, 40),
    "codellama-34b": _llama(48, 8192, 22016, 64, 8, max_position_embeddings=16384),
    "llama-2-70b": _llama(80, 8192, 28672, 64, 8),
}
LARGE = ("llama-2-7b", "llama-3-8b", "llama-2-13b", "codellama-34b", "llama-2-70b")
ALONE: dict[str, dict[str, Any]] = {
    "one GPU": {},
    "one GPU, 8-bit": {"kind": "adamw_8bit"},
    "one GPU, LoRA": {"lora": True},
}
SHARED = ("ZeRO-2", "ZeRO-2 + offload", "ZeRO-3", "ZeRO-3 + offload", "FSDP2")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def layerskip_recipe(
    name: str,
    *,
    micro: int,
    length: int,
    layers: int | None = None,
    lora: bool = False,
    kind: str = "adamw",
    checkpointing: bool = False,
    autocast: str = "bfloat16",
) -> Recipe[Any]:
    """LayerSkip with a rotational curriculum, as the paper trains; with `lora` the frozen weights are bfloat16.

    Raises UserError for an architecture that is not in ARCHITECTURES.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"architecture '{name}': not known; there are {', '.join(ARCHITECTURES)}")
    config = ARCHITECTURES[name] | ({"num_hidden_layers": layers} if layers else {})
    recipe = parse_recipe(
        {
            "output_dir": "runs/architectures",
            "max_steps": 100,
            "batch": {"sequences": micro, "length": length},
            "model": {
                "config": config,
                "tokenizer": {"train": {"vocab_size": 2048}},
                "autocast": autocast,
                "activation_checkpointing": checkpointing,
                "lora": {"rank": 16} if lora else None,
            },
            "data": {"train": [{"kind": "stdlib"}]},
            "objective": {
                "kind": "layerskip",
                "layer_dropout": {"p_max": 0.1},
                "early_exit": {"e_scale": 0.2, "curriculum": "rotational", "every": 8},
            },
            "optimizer": {"kind": kind, "lr": 1e-4},
        }
    )
    # The schema refuses bfloat16 for new weights, and these stand for loaded ones.
    frozen = {"model": recipe.model.model_copy(update={"dtype": "bfloat16"})} if lora else {}
    return recipe.model_copy(update=frozen)


def needs_of(recipe: Recipe[Any], chunk: int = ACCELERATOR_CHUNK_BYTES) -> Needs:
    """What `train.memory` reads of a recipe whose batch is one forward."""
    model = outline_model(recipe.model)
    objective = OBJECTIVES[recipe.objective.kind].build(recipe, model)
    micro = recipe.batch.sequences
    return Needs.of(recipe, objective, model, micro=micro, accumulates=False, chunk=chunk)


def random_model(recipe: Recipe[Any], device: torch.device) -> PreTrainedModel:
    """The recipe's architecture with random weights, made where and as they are used."""
    model = outline_model(recipe.model.model_copy(update={"lora": None}))
    with device:
        model = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    if recipe.model.lora is not None:
        add_lora(model, **recipe.model.lora.model_dump())
    if recipe.model.activation_checkpointing:
        enable_checkpointing(model)
    return model.train()


def measured_peak(recipe: Recipe[Any], device: torch.device) -> int:
    """Bytes of all tensors alive at the most, in the second of two steps: then the optimizer has its states."""
    torch.manual_seed(0)
    model = random_model(recipe, device)
    objective = OBJECTIVES[recipe.objective.kind].build(recipe, model)
    optimizer = build_optimizer(recipe.optimizer, objective)
    _step(recipe, objective, optimizer, device, 0)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _step(recipe, objective, optimizer, device, 1)
        return torch.cuda.max_memory_allocated(device)
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [*model.parameters(), *model.buffers(), *(v for v in states if isinstance(v, torch.Tensor))]
    with LiveBytes(tensors) as live:
        _step(recipe, objective, optimizer, device, 1)
    return live.peak


def _step(
    recipe: Recipe[Any], objective: Objective[Any], optimizer: Any, device: torch.device, step: int
) -> None:
    """Forward, backward and update on random tokens."""
    micro, length = recipe.batch.sequences, recipe.batch.length
    vocabulary = recipe.model.config["vocab_size"] if recipe.model.config else 0
    tokens = torch.randint(vocabulary, (micro, length + 1)).to(device)
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "row": list(range(micro))}
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision(recipe.model) == "bf16"):
        loss, _ = objective(batch, step, {"tokens": float(micro * length)})
    loss.backward()
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()}")
    optimizer.step()
    optimizer.zero_grad()


@app.command()
def step(
    name: Annotated[str, typer.Argument(help=f"one of {', '.join(ARCHITECTURES)}")],
    length: Annotated[int, typer.Option("--length", min=2, help="tokens a sequence")] = 512,
    micro: Annotated[int, typer.Option("--micro", min=1, help="sequences")] = 1,
    layers: Annotated[int | None, typer.Option("--layers", min=2, help="default: all of the model's")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="adapters on frozen bfloat16 weights")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="recompute layers")] = False,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw or adamw_8bit")] = "adamw",
    device: Annotated[str, typer.Option("--device", help="default: a GPU where there is one")] = "",
) -> None:
    """Two LayerSkip steps on random weights; prints the peak memory beside its estimate."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recipe = layerskip_recipe(
        name,
        micro=micro,
        length=length,
        layers=layers,
        lora=lora,
        checkpointing=checkpointing,
        kind=optimizer,
    )
    chunk = CPU_CHUNK_BYTES if place.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    needs = needs_of(recipe, chunk)
    expected = estimate(needs, "one process", 1, checkpointing=checkpointing)
    measured = measured_peak(recipe, place)
    kinds = [*(["LoRA"] if lora else []), *(["recomputed layers"] if checkpointing else [])]
    typer.echo(
        f"{name}: {needs.trained + needs.frozen:,} parameters, {needs.trained:,} train, {needs.layers} layers, "
        f"{micro} x {length} tokens, {', '.join([place.type, optimizer, *kinds])}: peak {measured / GIB:.2f} GiB, "
        f"estimate {expected.peak / GIB:.2f} GiB ({expected.peak / measured - 1.0:+.1%})"
    )


@app.command()
def table(
    names: Annotated[list[str] | None, typer.Argument(help=f"default: {' '.join(LARGE)}")] = None,
    ranks: Annotated[int, typer.Option("--ranks", min=2, help="processes of the sharded columns")] = 8,
    length: Annotated[int, typer.Option("--length", min=2, help="tokens a sequence")] = 4096,
    micro: Annotated[int, typer.Option("--micro", min=1, help="sequences of a forward on one rank")] = 1,
) -> None:
    """The estimate for every engine, as Markdown: GiB of one rank, layers kept / recomputed."""
    columns = [*ALONE, *(f"{engine}, {ranks}" for engine in SHARED)]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in track(names or LARGE, "counting", console=Console(stderr=True), transient=True):
        recipes = [
            layerskip_recipe(name, micro=micro, length=length, **options) for options in ALONE.values()
        ]
        all_needs = [needs_of(recipe) for recipe in recipes]
        cells = [_cell(needs, "one process", 1) for needs in all_needs]
        cells += [_cell(all_needs[0], engine, ranks) for engine in SHARED]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    typer.echo("\n".join(lines))


def _cell(needs: Needs, engine: str, ranks: int) -> str:
    kept, recomputed = (estimate(needs, engine, ranks, checkpointing=on) for on in (False, True))
    return f"{_gib(kept)} / {_gib(recomputed)}"


def _gib(found: Estimate) -> str:
    return f"{found.peak / GIB:.0f}"


if __name__ == "__main__":
    run_app(app, "python -m train.architectures")
