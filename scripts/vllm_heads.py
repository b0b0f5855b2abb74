"""Does vLLM accept the drafts of Medusa, EAGLE or EAGLE-3 heads as often as a chain of theirs is accepted here?

    python scripts/vllm_heads.py --run runs/quickstart/eagle3 --vllm_python /opt/vllm/bin/python

1. Exports the heads as vLLM loads them.
2. Decodes the prompts here, in float32, with a chain of first choices: vLLM knows no trees.
3. Decodes them in vLLM without and with the heads (scripts/vllm_decode.py, in vLLM's own environment).
4. Prints the share of proposals that were accepted up to each position, with 95 % intervals over prompts.

How to make vLLM's environment is told in scripts/vllm_draft_model.py.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import typer

from layerskip_model.command_line import flag, run_app
from layerskip_model.errors import UserError


class Chain(NamedTuple):
    """How the same chain is drafted in both.

    Attributes:
        method: vLLM's.
        settings: of our strategy.
        forms: those of our exports that vLLM loads.
    """

    method: str
    settings: dict[str, Any]
    forms: tuple[str, ...]


CHAINS = {  # by our strategy
    "medusa": Chain("medusa", {"tree": "chain"}, ("vllm",)),
    "eagle2": Chain("eagle", {"tree_top_k": 1}, ("vllm",)),
    "eagle3": Chain("eagle3", {"tree_top_k": 1}, ("vllm", "speculators")),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    vllm_python: Annotated[str, flag("vllm_python", "the Python of an environment that has vLLM")],
    model: Annotated[str | None, flag("model", "checkpoint directory or hub name")] = None,
    run: Annotated[
        str | None, flag("run", "output_dir of a finished run that trained heads, not --model")
    ] = None,
    draft: Annotated[str | None, flag("draft", "the heads; default: those of --run")] = None,
    to: Annotated[str, flag("to", "the form that they are written in: vllm, or speculators")] = "vllm",
    num_speculations: Annotated[
        int | None, flag("num_speculations", "drafts of an EAGLE head; default: its own. Of Medusa all heads")
    ] = None,
    dataset: Annotated[str, flag("dataset", "a JSONL file with prompt or turns, or heldout")] = "heldout",
    num_samples: Annotated[int | None, flag("num_samples", "prompts; default: 32 at most")] = None,
    max_steps: Annotated[int, flag("max_steps", "new tokens a prompt")] = 128,
) -> None:
    """Compare the acceptance of the same drafts in vLLM and here."""
    from eval.decoding.strategies import make_drafter
    from eval.draft_heads import drafting_strategy
    from eval.drafts import with_loaded_drafts
    from eval.prompts import dataset_path, encode_prompts, evenly_spaced
    from eval.target import load_target
    from eval.vllm import Engine, compare
    from layerskip_model.formats.eagle_export import export_eagle
    from layerskip_model.formats.medusa_export import export_medusa
    from layerskip_model.jsonl import read_prompts

    engine = Engine(vllm_python, Path(__file__).with_name("vllm_decode.py"))
    engine.require()
    heads = draft or run
    if heads is None:
        raise UserError("--draft is missing: name heads for --model, or the --run that trained them")
    strategy = drafting_strategy(heads)
    if strategy not in CHAINS:
        raise UserError(f"--draft '{heads}': these are no Medusa, EAGLE or EAGLE-3 heads; name some")
    chain = CHAINS[strategy]
    if to not in chain.forms:
        raise UserError(f"--to '{to}': vLLM loads {chain.method} heads as {' or '.join(chain.forms)}")
    if strategy == "medusa" and num_speculations is not None:
        raise UserError(
            f"--num_speculations {num_speculations}: each Medusa head drafts a token; leave it out"
        )
    target = load_target(model, run, dtype="float32")
    given = {"draft": heads, **chain.settings, "num_speculations": num_speculations}
    drafter = make_drafter(strategy, target.runner, **with_loaded_drafts(target, strategy, given))
    prompts = encode_prompts(target, evenly_spaced(read_prompts(dataset_path(target, dataset)), num_samples))
    with TemporaryDirectory() as place:
        export = export_medusa if strategy == "medusa" else export_eagle
        export(heads, to, Path(place))
        drafts = drafter.max_nodes - 1  # of a chain, without its root
        speculation = {"method": chain.method, "model": place, "num_speculative_tokens": drafts}
        settings = ":".join(f"{key}={value}" for key, value in chain.settings.items())
        words = (f"{strategy}:{settings}", "the heads")
        found = compare(
            engine, target, drafter, prompts, speculation=speculation, words=words, max_steps=max_steps
        )
    print(*found, sep="\n")


if __name__ == "__main__":
    run_app(app, "python scripts/vllm_heads.py")
