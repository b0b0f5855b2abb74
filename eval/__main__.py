"""python -m eval {generate, benchmark, exits, answers, compare}; flags have underscores, dashes work too."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from eval.command_line import output_directory, run_app, truth, whole_numbers
from layerskip_model.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _flag(name: str, text: str, **how: Any) -> Any:
    spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
    return typer.Option(*spellings, help=text, **how)


Model = Annotated[str | None, _flag("model", "checkpoint directory or hub name")]
Run = Annotated[str | None, _flag("run", "output_dir of a finished training run, in place of --model")]
ExitLayer = Annotated[int | None, _flag("exit_layer", "E: the first E layers draft")]
NumSpeculations = Annotated[int | None, _flag("num_speculations", "d: drafts a step")]
Temperature = Annotated[float | None, _flag("temperature", "of the sampling, above 0")]
TopK = Annotated[int | None, _flag("top_k", "sample among the k most likely tokens; 0: all")]
TopP = Annotated[
    float | None, _flag("top_p", "sample among the most likely tokens of this total probability")
]
Seed = Annotated[int, _flag("seed", "of all random numbers")]
Compile = Annotated[
    bool, _flag("compile", "capture passes: torch.compile on a CPU, CUDA graphs on a GPU; slow to start")
]
Dtype = Annotated[
    str | None, _flag("dtype", "float32 (default on a CPU), bfloat16 (on a GPU), float16, float64")
]
Device = Annotated[str | None, _flag("device", "cpu, cuda, cuda:1, ...; default: the first GPU if any")]
DeviceMap = Annotated[
    str | None, _flag("device_map", "auto: over all GPUs, then the CPU, then the disk, in place of --device")
]
Quantization = Annotated[
    str | None, _flag("quantization", "4bit or 8bit: weights by bitsandbytes, on a CUDA GPU")
]
Attention = Annotated[
    str | None,
    _flag("attn_implementation", "sdpa, eager or flash_attention_2; default: transformers' choice"),
]


@app.command()
def generate(
    model: Model = None,
    run: Run = None,
    prompt: Annotated[
        list[str] | None,
        _flag(
            "prompt",
            "text to continue; without it prompts are read line by line. Repeated: one batch, printed one after "
            "another on a terminal, elsewhere as one JSON object a line with prompt, text and finish_reason",
        ),
    ] = None,
    generation_strategy: Annotated[
        str, _flag("generation_strategy", "autoregressive (alias greedy) or self_speculative")
    ] = "autoregressive",
    exit_layer: ExitLayer = None,
    num_speculations: NumSpeculations = None,
    max_steps: Annotated[int, _flag("max_steps", "new tokens at most")] = 512,
    stop: Annotated[list[str] | None, _flag("stop", "end when this text appears; may be repeated")] = None,
    sample: Annotated[
        str, _flag("sample", "True: draw tokens; False: always the most likely", metavar="TRUE|FALSE")
    ] = "False",
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    compile: Compile = False,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    attn_implementation: Attention = None,
) -> None:
    """Continue prompts. autoregressive with an exit layer exits early, unverified."""
    from eval.choosing import Choosing
    from eval.decoding.strategies import strategy_name
    from eval.generate import Generator, interact
    from eval.target import load_target, with_captured_passes

    if "" in (prompt or []):
        raise UserError("--prompt '': is empty; give some text to continue, or leave it out to type prompts")
    strategy = strategy_name(generation_strategy)  # before a large model is loaded
    choosing = Choosing(truth(sample), temperature, top_k, top_p, seed)
    target = load_target(
        model,
        run,
        dtype=dtype,
        device=device,
        device_map=device_map,
        quantization=quantization,
        attn_implementation=attn_implementation,
    )
    generator = Generator.make(
        with_captured_passes(target) if compile else target,
        strategy,
        max_new_tokens=max_steps,
        stop=stop or [],
        choosing=choosing,
        exit_layer=exit_layer,
        num_speculations=num_speculations,
    )
    if prompt:
        generator.show(prompt)
    else:
        interact(generator)


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
    batch_size: Annotated[int, _flag("batch_size", "prompts decoded together")] = 1,
    sample: Annotated[
        str | None,
        _flag(
            "sample",
            "True: only sampled, False: only greedy; default: greedy, and sampled beside it",
            metavar="TRUE|FALSE",
        ),
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    compile: Compile = False,
    profile: Annotated[bool, _flag("profile", "say where the time of a step goes")] = False,
    output_dir: Annotated[
        str | None, _flag("output_dir", "for report.json, report.md, report.html and table.txt")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    attn_implementation: Attention = None,
) -> None:
    """Time strategies against plain decoding and prove their output equal. With --run nothing else is needed."""
    from rich.console import Console

    from eval.benchmark import Request, run_together
    from eval.ranks import join_ranks
    from eval.report import tables, write_report
    from eval.target import load_target

    names = [name.strip() for name in strategies.split(",") if name.strip()]
    request = Request(
        strategies=names,
        exit_layer=exit_layer,
        num_speculations=num_speculations,
        dataset=dataset,
        num_samples=num_samples,
        max_steps=max_steps,
        batch_size=batch_size,
        sample=None if sample is None else truth(sample),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        compile=compile,
        profile=profile,
    )
    ranks = join_ranks()
    with ranks.together(), output_directory(output_dir if ranks.is_first else None) as place:
        target = load_target(
            model,
            run,
            dtype=dtype,
            device=ranks.device(device, device_map),
            device_map=device_map,
            quantization=quantization,
            attn_implementation=attn_implementation,
        )
        report = run_together(target, request, ranks)
        if report is None:
            return
        Console().print(*tables(report))
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
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    attn_implementation: Attention = None,
) -> None:
    """Cross entropy, bits per byte, top-1 accuracy and agreement with the last layer, for every exit."""
    from rich.console import Console

    from eval.exits import heldout_texts, measure_exits, window_length
    from eval.prompts import dataset_path
    from eval.report import exits_table, plot_exits
    from eval.target import load_target
    from layerskip_model.jsonl import write_rows

    with output_directory(output_dir) as place:
        target = load_target(
            model,
            run,
            dtype=dtype,
            device=device,
            device_map=device_map,
            quantization=quantization,
            attn_implementation=attn_implementation,
        )
        texts = heldout_texts(dataset_path(target, dataset))
        length = window_length(target, context_length)
        qualities = measure_exits(target.model, target.tokenizer, texts, length)
        Console().print(exits_table(qualities))
        if place is not None:
            write_rows(place / "exits.jsonl", [quality.model_dump() for quality in qualities])
            plot_exits(qualities, place / "exits.png")
            print(f"plot: {place / 'exits.png'}")


@app.command()
def answers(
    model: Model = None,
    run: Run = None,
    dataset: Annotated[
        str, _flag("dataset", "a JSONL file of prompt and response, the right answer; or heldout")
    ] = "heldout",
    num_samples: Annotated[int | None, _flag("num_samples", "prompts; default: all")] = None,
    exits: Annotated[str | None, _flag("exits", "exit layers to ask, 4,8; default: every one")] = None,
    exit_layer: ExitLayer = None,
    num_speculations: NumSpeculations = None,
    output_dir: Annotated[str | None, _flag("output_dir", "for answers.jsonl")] = None,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    attn_implementation: Attention = None,
) -> None:
    """Exact match of every exit on a task with one right answer, and of self-speculation beside them."""
    from rich.console import Console

    from eval.answers import measure_answers, questions
    from eval.prompts import dataset_path, evenly_spaced
    from eval.report import answers_table
    from eval.target import load_target
    from layerskip_model.jsonl import read_prompts, write_rows

    wanted = None if exits is None else whole_numbers("--exits", exits)
    with output_directory(output_dir) as place:
        target = load_target(
            model,
            run,
            dtype=dtype,
            device=device,
            device_map=device_map,
            quantization=quantization,
            attn_implementation=attn_implementation,
        )
        rows = read_prompts(dataset_path(target, dataset))
        asked = questions(target, evenly_spaced(rows, num_samples or len(rows)))
        given = {"exit_layer": exit_layer, "num_speculations": num_speculations}
        suggested = target.run.suggested if target.run is not None else {}
        speculation = suggested | {key: value for key, value in given.items() if value is not None}
        exit_layers = range(1, target.runner.num_layers + 1) if wanted is None else wanted
        found = measure_answers(target, asked, exit_layers, speculation or None)
        Console().print(answers_table(found))
        if place is not None:
            write_rows(place / "answers.jsonl", [answer.model_dump() for answer in found])


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="output_dirs of finished training runs")],
    exits: Annotated[
        str | None, _flag("exits", "exit layers to show, 4,8; default: four over the depth")
    ] = None,
) -> None:
    """Held-out quality of several runs' exits as a Markdown table, runs that differ only in their seed together.

    A benchmark in RUN/report adds its speedup.
    """
    from eval.compare import compare, group_runs

    shown = None if exits is None else whole_numbers("--exits", exits)
    print(compare(group_runs(runs), shown))


if __name__ == "__main__":
    rank = int(os.environ.get("RANK", "0"))  # of the processes that torchrun or accelerate launched
    if rank == 0 or sys.argv[1:2] == ["benchmark"]:  # what is not shared is done once
        run_app(app, "python -m eval", speaks=rank == 0)
