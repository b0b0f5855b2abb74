"""python -m eval {generate, benchmark, exits}; every flag is spelled with underscores, dashes work too."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from layerskip_model.errors import UserError

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True
)


def _flag(name: str, text: str) -> Any:
    spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
    return typer.Option(*spellings, help=text)


Model = Annotated[str | None, _flag("model", "checkpoint directory or hub name")]
Run = Annotated[str | None, _flag("run", "output_dir of a finished training run, in place of --model")]
ExitLayer = Annotated[int | None, _flag("exit_layer", "E: the first E layers draft")]
NumSpeculations = Annotated[int | None, _flag("num_speculations", "d: drafts a step")]
Dtype = Annotated[
    str | None, _flag("dtype", "float32 (default on a CPU), bfloat16 (on a GPU), float16, float64")
]
Device = Annotated[str | None, _flag("device", "cpu, cuda, cuda:1, ...; default: the first GPU if any")]
Attention = Annotated[
    str | None, _flag("attn_implementation", "sdpa or eager; default: transformers' choice")
]


@app.command()
def generate(
    model: Model = None,
    run: Run = None,
    prompt: Annotated[
        str | None, _flag("prompt", "text to continue; without it prompts are read line by line")
    ] = None,
    generation_strategy: Annotated[
        str, _flag("generation_strategy", "autoregressive (alias greedy) or self_speculative")
    ] = "autoregressive",
    exit_layer: ExitLayer = None,
    num_speculations: NumSpeculations = None,
    max_steps: Annotated[int, _flag("max_steps", "new tokens at most")] = 512,
    stop: Annotated[list[str] | None, _flag("stop", "end when this text appears; may be repeated")] = None,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
) -> None:
    """Continue a prompt. autoregressive with an exit layer exits early, unverified."""
    from eval.generate import Generator, interact
    from eval.target import load_target

    if int(os.environ.get("RANK", "0")) > 0:  # under torchrun one process answers
        return
    if prompt == "":
        raise UserError("--prompt '': is empty; give some text to continue, or leave it out to type prompts")
    target = load_target(model, run, dtype=dtype, device=device, attn_implementation=attn_implementation)
    settings = {"exit_layer": exit_layer, "num_speculations": num_speculations}
    generator = Generator.make(target, generation_strategy, settings, max_steps, stop or [])
    if prompt is None:
        interact(generator)
    else:
        generator.show(prompt)


@app.command()
def benchmark(
    model: Model = None,
    run: Run = None,
    strategies: Annotated[
        str, _flag("strategies", "comma-separated")
    ] = "autoregressive,self_speculative,hf_generate,hf_early_exit",
    exit_layer: ExitLayer = None,
    num_speculations: NumSpeculations = None,
    dataset: Annotated[str, _flag("dataset", "a JSONL file with prompt or turns, or heldout")] = "heldout",
    num_samples: Annotated[int, _flag("num_samples", "prompts")] = 32,
    max_steps: Annotated[int, _flag("max_steps", "new tokens a prompt")] = 128,
    output_dir: Annotated[
        str | None, _flag("output_dir", "for report.json, report.md and report.html")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
) -> None:
    """Time strategies against plain decoding and prove their output equal. With --run nothing else is needed."""
    from rich.console import Console

    from eval.benchmark import Request
    from eval.benchmark import benchmark as measure
    from eval.report import strategy_table, write_report
    from eval.target import load_target

    place = output_directory(output_dir)
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    target = load_target(model, run, dtype=dtype, device=device, attn_implementation=attn_implementation)
    report = measure(target, Request(names, exit_layer, num_speculations, dataset, num_samples, max_steps))
    Console().print(strategy_table(report))
    if place is not None:
        write_report(report, place)
        print(f"report: {place / 'report.html'}")


@app.command()
def exits(
    model: Model = None,
    run: Run = None,
    dataset: Annotated[
        str, _flag("dataset", "a JSONL file with text, or prompt and response; or heldout")
    ] = "heldout",
    context_length: Annotated[
        int | None,
        _flag("context_length", "tokens a window; default: the training length, else the model's context"),
    ] = None,
    output_dir: Annotated[str | None, _flag("output_dir", "for exits.png and exits.jsonl")] = None,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
) -> None:
    """Cross entropy, bits per byte, top-1 accuracy and agreement with the last layer, for every exit."""
    from rich.console import Console

    from eval.benchmark import dataset_path
    from eval.exits import heldout_texts, measure_exits
    from eval.report import exits_table, plot_exits
    from eval.target import load_target

    place = output_directory(output_dir)
    target = load_target(model, run, dtype=dtype, device=device, attn_implementation=attn_implementation)
    texts = heldout_texts(dataset_path(target, dataset))
    limit = target.runner.context_length
    length = context_length or (target.run.length if target.run else limit)
    if not 1 <= length <= limit:
        raise UserError(f"--context_length {length}: the model's context allows 1 to {limit}")
    qualities = measure_exits(target.model, target.tokenizer, texts, length)
    Console().print(exits_table(qualities))
    if place is not None:
        from layerskip_model.jsonl import write_rows

        write_rows(place / "exits.jsonl", [quality.model_dump() for quality in qualities])
        plot_exits(qualities, place / "exits.png")
        print(f"plot: {place / 'exits.png'}")


def output_directory(path: str | None) -> Path | None:
    """The directory, made before the work begins so that hours of it cannot be lost to a typing error."""
    if path is None:
        return None
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir '{path}' cannot be made: {error.strerror}") from None
    return Path(path)


def main() -> None:
    """Run a command; a mistake of the user's is one line and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
