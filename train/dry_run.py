"""python -m train RECIPE --dry_run: what a recipe would do, from its text and the outline of its model alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from layerskip_model.errors import UserError
from train.config import Recipe
from train.data.batches import cut_for_rank
from train.data.tokenizer import load_tokenizer
from train.features import size_lines
from train.memory import ENGINES, Estimate, Needs, estimate
from train.model import check_fits, mixed_precision, outline_model, tokenizer_config
from train.model_config import ModelConfig
from train.objectives import OBJECTIVES
from train.objectives.base import Objective
from train.optimizer import parameter_groups
from train.schedule_plot import COLUMNS, PLAIN_SHADES, SHADES, heatmap, rotates

GIB = 2**30
KEPT = {False: "all", True: "inputs"}  # of each layer, for the backward
DRAWN_STEPS = 1000  # of a run whose length only the data knows


def dry_run(recipe: Recipe[Any], ranks: int, console: Console) -> None:
    """Print the resolved recipe, sizes, groups, steps, memory and schedule of a run over `ranks` processes.

    Loads no weights, tokenises nothing and writes nothing. Raises UserError for what cannot work anywhere, and
    where the configuration of a model that the recipe names cannot be reached.
    """
    model = outline_model(sized(recipe.model))
    check_fits(recipe.model, model, 0, recipe.batch.length)
    total = recipe.max_steps or (recipe.with_total_steps(0).total_steps if recipe.max_tokens else None)
    drawn = recipe.model_copy(update={"max_steps": total or DRAWN_STEPS, "max_tokens": None, "epochs": None})
    objective = OBJECTIVES[recipe.objective.kind].build(drawn, model)
    _print(
        console, "Recipe", yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False)
    )
    _print(console, "Model", parameter_table(model))
    _print(console, "Optimizer", group_table(recipe, objective))
    known = drawn if total else recipe  # how many steps there are
    lines = [*length_lines(recipe, total, ranks), *data_lines(recipe), *size_lines(known, objective)]
    _print(console, "Run", "\n".join(lines))
    _print(console, "Memory of a rank (estimate)", memory_table(memory_rows(drawn, objective, model, ranks)))
    console.print(Text(memory_note(recipe, ranks)))
    shades = SHADES if console.encoding.lower().startswith("utf") else PLAIN_SHADES
    note = "" if total else f", drawn as if it had {DRAWN_STEPS:,} steps"
    _print(console, f"Schedule{note}", "\n".join(schedule_lines(drawn, objective, shades)))


def _print(console: Console, title: str, content: Any) -> None:
    console.print(Text(f"\n{title}", style="bold"))
    console.print(Text(content.rstrip(), no_wrap=False) if isinstance(content, str) else content)


def sized(config: ModelConfig) -> ModelConfig:
    """A new model's configuration with the vocabulary that it will have: at most that of its tokenizer."""
    if config.config is None or "vocab_size" in config.config:
        return config
    tokenizer = tokenizer_config(config)
    if tokenizer.train is not None:
        size = tokenizer.train.vocab_size
    else:
        assert tokenizer.name_or_path is not None
        size = len(load_tokenizer(tokenizer.name_or_path))
    return config.model_copy(update={"config": config.config | {"vocab_size": size}})


def parameter_table(model: PreTrainedModel) -> Table:
    """Counts of parameters: all, those that train, embedding and head, a decoder layer."""
    layers = model.get_decoder().layers
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head.weight is embedding.weight
    parts = {
        "all": list(model.parameters()),
        "trained": [p for p in model.parameters() if p.requires_grad],
        "frozen": [p for p in model.parameters() if not p.requires_grad],
        f"embedding{' = LM head' if tied else ''}": [embedding.weight],
        **({} if tied else {"LM head": [head.weight]}),
        f"one of {len(layers)} layers": list(layers[-1].parameters()),
    }
    table = _table("", "parameters", "bytes")
    for name, parameters in parts.items():
        count = sum(p.numel() for p in parameters)
        table.add_row(name, f"{count:,}", _size(sum(p.numel() * p.element_size() for p in parameters)))
    return table


def group_table(recipe: Recipe[Any], objective: Objective[Any]) -> Table:
    """The optimizer's groups: how many tensors and parameters, learning rate and decay."""
    table = _table("optimizer", "tensors", "parameters", "full rate", "decay")
    for group in parameter_groups(recipe.optimizer, objective):
        count = sum(p.numel() for p in group.parameters)
        name = recipe.optimizer.kind if group.of_matrices else "adamw"
        table.add_row(
            name, f"{len(group.parameters):,}", f"{count:,}", f"{group.lr:g}", f"{group.weight_decay:g}"
        )
    return table


def length_lines(recipe: Recipe[Any], total: int | None, ranks: int) -> list[str]:
    """Tokens and steps, and how ranks and accumulation share a batch."""
    batch = recipe.batch
    tokens = batch.sequences * batch.length
    micro = [len(rows) for rows in cut_for_rank(batch.sequences, batch.micro or batch.sequences, 0, ranks)]
    shape = " + ".join(map(str, micro)) if len(set(micro)) > 1 else f"{len(micro)} x {micro[0]}"
    lines = [f"a step: {batch.sequences:,} sequences of {batch.length:,} tokens, {tokens:,} in all"]
    if total is None:
        lines.append(f"steps: {recipe.epochs:g} epochs; how many steps that is only the tokenised data tells")
    else:
        lines.append(f"steps: {total:,}, {total * tokens:,} tokens")
    lines.append(f"a rank of {ranks}: {shape} sequences a step (forwards x sequences), {precision(recipe)}")
    return lines


def precision(recipe: Recipe[Any]) -> str:
    """How matrices are multiplied here."""
    found = "bfloat16 autocast" if mixed_precision(recipe.model) == "bf16" else "no autocast"
    return f"{found} as this machine has it" if recipe.model.autocast == "auto" else found


def data_lines(recipe: Recipe[Any]) -> list[str]:
    """Each source, and whether its first document is there. What lies on the hub is not asked for."""
    lines = []
    for part, sources in (("train", recipe.data.train), ("heldout", recipe.data.heldout_sources)):
        for source in sources:
            if (name := getattr(source, "name", None)) is not None:
                found = f"'{name}', not looked at"
            else:
                try:
                    found = f"there, first document {next(source.documents()).name}"
                except UserError as error:
                    found = f"NOT usable here: {error}"
            lines.append(f"data.{part}: {source.kind}, {found}")
    return lines


def memory_rows(
    recipe: Recipe[Any], objective: Objective[Any], model: PreTrainedModel, ranks: int
) -> list[tuple[str, bool, Estimate]]:
    """(engine, activation checkpointing, estimate) for the engines that suit so many ranks and the optimizer."""
    parts = cut_for_rank(recipe.batch.sequences, recipe.batch.micro or recipe.batch.sequences, 0, ranks)
    needs = Needs.of(recipe, objective, model, micro=len(parts[0]), accumulates=len(parts) > 1)
    return [
        (engine, checkpointing, estimate(needs, engine, ranks, checkpointing=checkpointing))
        for engine in ENGINES
        if (engine == "one process") == (ranks == 1) or "offload" in engine
        if engine in ("one process", "DDP") or recipe.optimizer.kind == "adamw"  # others are not for shards
        for checkpointing in (False, True)
    ]


def memory_table(rows: Sequence[tuple[str, bool, Estimate]]) -> Table:
    """Memory of a rank by engine, without and with activation checkpointing."""
    unit, name = memory_unit(rows)
    table = _table(name, "kept", "weights", "grads", "states", "activ.", "peak", "host")
    for engine, checkpointing, e in rows:
        parts = (e.weights, e.gradients, e.optimizer, e.activations, e.peak, e.host)
        table.add_row(engine, KEPT[checkpointing], *(f"{part / unit:.1f}" for part in parts))
    return table


def memory_unit(rows: Sequence[tuple[str, bool, Estimate]]) -> tuple[int, str]:
    """The unit that suits the smallest peak."""
    return (GIB, "GiB") if min(e.peak for _, _, e in rows) >= GIB else (GIB // 1024, "MiB")


def memory_note(recipe: Recipe[Any], ranks: int) -> str:
    """What the table is of."""
    kept = KEPT[recipe.model.activation_checkpointing]
    return (
        f"{ranks} rank(s), {precision(recipe)}. Kept: all that a layer's backward needs, or its inputs (with "
        f"model.activation_checkpointing); this recipe: {kept}. The peak is less than the sum: activations go while "
        "gradients come. A GPU needs 1 to 2 GiB more for itself."
    )


def schedule_lines(recipe: Recipe[Any], objective: Objective[Any], shades: str) -> list[str]:
    """The learning rate and all that the method changes, over the run; what rotates also over the first steps."""
    steps = range(recipe.total_steps)

    def rate(step: int) -> list[float]:
        return [recipe.optimizer.lr * recipe.schedule.factor(step, recipe.total_steps)]

    lines = ["learning rate", *heatmap(rate, steps, shades=shades)]
    for name in objective.schedule(0):

        def values(step: int, name: str = name) -> list[float]:
            return objective.schedule(step)[name]

        if not any(any(values(step)) for step in (steps[0], steps[len(steps) // 2], steps[-1])):
            lines.append(f"{name.replace('_', ' ')}: none")
            continue
        lines += [f"{name.replace('_', ' ')}, by layer", *heatmap(values, steps, shades=shades)]
        if rotates(values, steps) and len(steps) > COLUMNS:
            lines += [f"{name.replace('_', ' ')}, by layer, first steps"]
            lines += heatmap(values, steps[:COLUMNS], shades=shades)
    return lines


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
