"""python -m eval {generate, benchmark, exits}; every flag is spelled with underscores, dashes work too."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from eval.command_line import output_directory, run_app
from layerskip_model.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


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
    from eval.decoding.strategies import strategy_name
    from eval.generate import Generator, interact
    from eval.target import load_target

    if prompt == "":
        raise UserError("--prompt '': is empty; give some text to continue, or leave it out to type prompts")
    strategy = strategy_name(generation_strategy)  # before a large model is loaded
    target = load_target(model, run, dtype=dtype, device=device, attn_implementation=attn_implementation)
    generator = Generator.make(
        target,
        strategy,
        max_new_tokens=max_steps,
        stop=stop or [],
        exit_layer=exit_layer,
        num_speculations=num_speculations,
    )
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
    num_samples: Annotated[
        int | None, _flag("num_samples", "prompts; default: 32, or all of a smaller file")
    ] = None,
    max_steps: Annotated[int, _flag("max_steps", "new tokens a prompt")] = 128,
    output_dir: Annotated[
        str | None, _flag("output_dir", "for report.json, report.md, report.html and table.txt")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
) -> None:
    """Time strategies against plain decoding and prove their output equal. With --run nothing else is needed."""
    from rich.console import Console

    from eval.benchmark import Request, run_benchmark
    from eval.report import strategy_table, write_report
    from eval.target import load_target

    names = [name.strip() for name in strategies.split(",") if name.strip()]
    request = Request(names, exit_layer, num_speculations, dataset, num_samples, max_steps)
    with output_directory(output_dir) as place:
        target = load_target(model, run, dtype=dtype, device=device, attn_implementation=attn_implementation)
        report = run_benchmark(target, request)
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
    from eval.exits import heldout_texts, measure_exits, window_length
    from eval.report import exits_table, plot_exits
    from eval.target import load_target
    from layerskip_model.jsonl import write_rows

    with output_directory(output_dir) as place:
        target = load_target(model, run, dtype=dtype, device=device, attn_implementation=attn_implementation)
        texts = heldout_texts(dataset_path(target, dataset))
        length = window_length(target, context_length)
        qualities = measure_exits(target.model, target.tokenizer, texts, length)
        Console().print(exits_table(qualities))
        if place is not None:
            write_rows(place / "exits.jsonl", [quality.model_dump() for quality in qualities])
            plot_exits(qualities, place / "exits.png")
            print(f"plot: {place / 'exits.png'}")


if __name__ == "__main__" and int(os.environ.get("RANK", "0")) == 0:  # under torchrun one process answers
    run_app(app, "python -m eval")
