"""python -m eval {generate, benchmark, correctness, tree, doctor, exits, answers, compare}; flags with _ or with -."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from eval.command_line import output_directory, truth, whole_numbers
from eval.flags import (
    ChoosingFlags,
    Drafting,
    ExitLayer,
    Loading,
    NumSpeculations,
    OutputDir,
    Prompts,
    given,
    with_flags,
)
from layerskip_model.command_line import flag, run_app
from layerskip_model.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Compile = Annotated[
    bool, flag("compile", "capture passes: torch.compile on a CPU, CUDA graphs on a GPU; slow to start")
]


@app.command()
@with_flags
def generate(
    *,
    loading: Loading,
    prompt: Annotated[
        list[str] | None,
        flag(
            "prompt",
            "text to continue; without it prompts are read line by line. Repeated: one batch, printed one after "
            "another on a terminal, elsewhere as one JSON object a line with prompt, text and finish_reason",
        ),
    ] = None,
    generation_strategy: Annotated[
        str,
        flag(
            "generation_strategy",
            "autoregressive (alias greedy), self_speculative, speculative_sampling, prompt_lookup, lookahead, "
            "medusa, hydra, eagle, eagle2 or eagle3",
        ),
    ] = "autoregressive",
    max_steps: Annotated[int, flag("max_steps", "new tokens at most")] = 512,
    stop: Annotated[list[str] | None, flag("stop", "end when this text appears; may be repeated")] = None,
    drafting: Drafting,
    sample: Annotated[
        str, flag("sample", "True: draw tokens; False: always the most likely", metavar="TRUE|FALSE")
    ] = "False",
    choosing: ChoosingFlags,
    compile: Compile = False,
) -> None:
    """Continue prompts. autoregressive with an exit layer exits early, unverified."""
    from eval.choosing import Choosing
    from eval.decoding.strategies import strategy_name
    from eval.generate import Generator, interact
    from eval.target import with_captured_passes

    if "" in (prompt or []):
        raise UserError("--prompt '': is empty; give some text to continue, or leave it out to type prompts")
    strategy = strategy_name(generation_strategy)  # before a large model is loaded
    chosen = Choosing(truth(sample), **given(choosing))
    target = loading.load()
    generator = Generator.make(
        with_captured_passes(target) if compile else target,
        strategy,
        max_new_tokens=max_steps,
        stop=stop or [],
        choosing=chosen,
        **given(drafting),
    )
    if prompt:
        generator.show(prompt)
    else:
        interact(generator)


@app.command()
@with_flags
def benchmark(
    *,
    loading: Loading,
    strategies: Annotated[
        str | None,
        flag(
            "strategies",
            "NAME[:KEY=VALUE]..., comma-separated: settings of one entry alone may follow its name",
        ),
    ] = None,
    drafting: Drafting,
    prompts: Prompts,
    sample: Annotated[
        str | None,
        flag(
            "sample",
            "True: only sampled, False: only greedy; default: greedy, and sampled beside it",
            metavar="TRUE|FALSE",
        ),
    ] = None,
    choosing: ChoosingFlags,
    compile: Compile = False,
    profile: Annotated[bool, flag("profile", "say where the time of a step goes")] = False,
    output_dir: OutputDir = None,
) -> None:
    """Time strategies against plain decoding and prove their output equal. With --run nothing else is needed.

    With --output_dir: report.json, report.md, report.html and table.txt.
    """
    from rich.console import Console

    from eval.benchmark import Request, run_together
    from eval.ranks import join_ranks
    from eval.report import tables, write_report

    named: dict[str, Any] = {} if strategies is None else {"strategies": entries(strategies)}
    request = Request(
        **named,
        **vars(prompts),
        **given(choosing),
        settings=given(drafting),
        sample=None if sample is None else truth(sample),
        compile=compile,
        profile=profile,
    )
    ranks = join_ranks()
    with ranks.together(), output_directory(output_dir if ranks.is_first else None) as place:
        target = loading.load(device=ranks.device(loading.device, loading.device_map))
        report = run_together(target, request, ranks)
        if report is None:
            return
        Console().print(*tables(report))
        if place is not None:
            write_report(report, place)
            print(f"report: {place / 'report.html'}")


@app.command()
@with_flags
def correctness(
    *,
    loading: Loading,
    strategies: Annotated[
        str | None,
        flag(
            "strategies",
            "NAME[:KEY=VALUE]..., comma-separated; default: every strategy that the model and the flags allow",
        ),
    ] = None,
    drafting: Drafting,
    prompts: Prompts,
    sample: Annotated[
        str,
        flag("sample", "True: compare drawn tokens, where drafts are not drawn", metavar="TRUE|FALSE"),
    ] = "False",
    choosing: ChoosingFlags,
    distribution: Annotated[
        bool,
        flag(
            "distribution",
            "test by chi-square whether sampled texts have the model's own probabilities (default of "
            "--temperature: 0.8, of --num_samples: 1, of --dtype: float32)",
        ),
    ] = False,
    draws: Annotated[int, flag("draws", "with --distribution: texts drawn for each prompt")] = 20_000,
    tokens: Annotated[int, flag("tokens", "with --distribution: tokens of a text")] = 4,
    compile: Compile = False,
    output_dir: OutputDir = None,
) -> None:
    """Check that strategies are lossless on this model; exit status 1 where one is not.

    Token ids are compared with plain decoding's. A float64 replay decides of each difference whether it is a tie,
    which rounding explains, or a bug. With --output_dir: differences.jsonl, or distribution.jsonl.
    """
    from eval.correctness import Check, check_tokens
    from eval.distribution import check_distribution
    from eval.target import with_captured_passes

    check = Check(
        strategies=None if strategies is None else entries(strategies),
        settings=given(drafting),
        sample=truth(sample) or distribution,
        choosing=given(choosing),
        **vars(prompts),
    )
    with output_directory(output_dir) as place:
        target = loading.load(dtype="float32") if distribution and loading.dtype is None else loading.load()
        target = with_captured_passes(target) if compile else target
        if distribution:
            sound = check_distribution(target, check, draws, tokens, place)
        else:
            sound = check_tokens(target, check, place)
    if not sound:
        raise typer.Exit(1)


@app.command()
@with_flags
def exits(
    loading: Loading,
    dataset: Annotated[
        str, flag("dataset", "a JSONL file with text, or prompt and response; or heldout")
    ] = "heldout",
    context_length: Annotated[
        int | None,
        flag("context_length", "tokens a window; default: the training length, else the model's context"),
    ] = None,
    output_dir: OutputDir = None,
) -> None:
    """Cross entropy, bits per byte, top-1 accuracy and agreement with the last layer, for every exit.

    With --output_dir: exits.png and exits.jsonl.
    """
    from rich.console import Console

    from eval.exits import heldout_texts, measure_exits, window_length
    from eval.prompts import dataset_path
    from eval.report import exits_table, plot_exits
    from layerskip_model.jsonl import write_rows

    with output_directory(output_dir) as place:
        target = loading.load()
        texts = heldout_texts(dataset_path(target, dataset))
        length = window_length(target, context_length)
        qualities = measure_exits(target.model, target.tokenizer, texts, length)
        Console().print(exits_table(qualities))
        if place is not None:
            write_rows(place / "exits.jsonl", [quality.model_dump() for quality in qualities])
            plot_exits(qualities, place / "exits.png")
            print(f"plot: {place / 'exits.png'}")


@app.command()
@with_flags
def answers(
    loading: Loading,
    dataset: Annotated[
        str, flag("dataset", "a JSONL file of prompt and response, the right answer; or heldout")
    ] = "heldout",
    num_samples: Annotated[int | None, flag("num_samples", "prompts; default: all")] = None,
    exits: Annotated[str | None, flag("exits", "exit layers to ask, 4,8; default: every one")] = None,
    exit_layer: ExitLayer = None,
    num_speculations: NumSpeculations = None,
    output_dir: OutputDir = None,
) -> None:
    """Exact match of every exit on a task with one right answer, and of self-speculation beside them.

    With --output_dir: answers.jsonl.
    """
    from rich.console import Console

    from eval.answers import measure_answers, questions
    from eval.prompts import dataset_path, evenly_spaced
    from eval.report import answers_table
    from eval.strategy_spec import EXITS, suggested
    from layerskip_model.jsonl import read_prompts, write_rows

    wanted = None if exits is None else whole_numbers("--exits", exits)
    with output_directory(output_dir) as place:
        target = loading.load()
        rows = read_prompts(dataset_path(target, dataset))
        asked = questions(target, evenly_spaced(rows, num_samples or len(rows)))
        asked_for = {"exit_layer": exit_layer, "num_speculations": num_speculations}
        own = {key: value for key, value in asked_for.items() if value is not None}
        speculation = suggested(target, EXITS, own) | own
        exit_layers = range(1, target.runner.num_layers + 1) if wanted is None else wanted
        found = measure_answers(target, asked, exit_layers, speculation or None)
        Console().print(answers_table(found))
        if place is not None:
            write_rows(place / "answers.jsonl", [answer.model_dump() for answer in found])


@app.command()
@with_flags
def tree(
    *,
    loading: Loading,
    draft: Annotated[
        str | None,
        flag("draft", "directory of heads, or the run that trained them; default: those of the --run"),
    ] = None,
    dataset: Annotated[str, flag("dataset", "a JSONL file with prompt or turns, or heldout")] = "heldout",
    num_samples: Annotated[
        int | None, flag("num_samples", "prompts; default: 32, or all of a smaller file")
    ] = None,
    max_steps: Annotated[int, flag("max_steps", "new tokens a prompt")] = 128,
    max_nodes: Annotated[int, flag("max_nodes", "nodes of the largest tree that is looked at")] = 63,
    sample: Annotated[
        str, flag("sample", "True: the best for drawn tokens; False: for greedy ones", metavar="TRUE|FALSE")
    ] = "False",
    choosing: ChoosingFlags,
    output_dir: Annotated[
        str | None, flag("output_dir", "where tree.json goes, made if need be; default: beside the heads")
    ] = None,
) -> None:
    """Find the tree that gives the most tokens per second with these heads on this machine; tree.json beside them.

    From how often the heads are right on the model's own continuations, what steps with trees of all sizes take, and
    a race of the best. For an EAGLE head: chains, trees that grow, and for EAGLE-1's strategy a static tree.
    """
    from rich.console import Console

    from eval.choosing import Choosing
    from eval.tree_report import place_beside, save_trees, summary, tree_tables
    from eval.tree_search import Request, draft_name, search_trees

    request = Request(dataset, num_samples, max_steps, max_nodes, Choosing(truth(sample), **given(choosing)))
    target = loading.load()
    name = draft_name(target, draft)
    with output_directory(output_dir or place_beside(name)) as place:
        assert place is not None
        found = search_trees(target, name, request)
        Console().print(*tree_tables(found))
        print(summary(found, save_trees(target, found, request, place)))


@app.command()
@with_flags
def doctor(
    loading: Loading,
    draft: Annotated[
        str | None,
        flag("draft", "directory of heads, or the run that trained them; default: those of the --run"),
    ] = None,
    dataset: Annotated[str, flag("dataset", "a JSONL file with prompt or turns, or heldout")] = "heldout",
    num_samples: Annotated[
        int | None, flag("num_samples", "prompts; default: 16, or all of a smaller file")
    ] = None,
    max_steps: Annotated[int, flag("max_steps", "new tokens a prompt")] = 64,
    output_dir: OutputDir = None,
) -> None:
    """Check whether drafting heads belong to a model and are told the right things; exit status 1 if not.

    Weights, sizes, layers and RoPE; what they say against what they said when they were exported; how many drafts the
    model's own text would accept. With --output_dir: doctor.json.
    """
    from rich.console import Console

    from eval.doctor import examine
    from eval.doctor_report import examination_tables, save_examination, verdict
    from eval.head_acceptance import Request
    from eval.tree_search import draft_name

    request = Request(dataset, num_samples, max_steps)
    with output_directory(output_dir) as place:
        target = loading.load()
        examination = examine(target, draft_name(target, draft), request)
        Console().print(*examination_tables(examination))
        print(verdict(examination))
        if place is not None:
            save_examination(examination, place)
    if not examination.is_sound:
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="output_dirs of finished training runs")],
    exits: Annotated[
        str | None, flag("exits", "exit layers to show, 4,8; default: four over the depth")
    ] = None,
) -> None:
    """Held-out quality of several runs' exits as a Markdown table, runs that differ only in their seed together.

    A benchmark in RUN/report adds its speedup.
    """
    from eval.compare import compare, group_runs

    shown = None if exits is None else whole_numbers("--exits", exits)
    print(compare(group_runs(runs), shown))


def entries(text: str) -> list[str]:
    """The entries of `--strategies`."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


if __name__ == "__main__":
    rank = int(os.environ.get("RANK", "0"))  # of the processes that torchrun or accelerate launched
    if rank == 0 or sys.argv[1:2] == ["benchmark"]:  # what is not shared is done once
        run_app(app, "python -m eval", speaks=rank == 0)
