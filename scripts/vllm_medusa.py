"""Does vLLM accept the drafts of Medusa heads as often as the chain of their first choices is accepted here?

    python scripts/vllm_medusa.py --run runs/quickstart/medusa --vllm_python /opt/vllm/bin/python

1. Exports the heads as vLLM loads them.
2. Decodes the prompts here, in float32, by the strategy `medusa` with the tree `chain`: vLLM knows no trees.
3. Decodes them in vLLM without and with the heads (scripts/vllm_decode.py, in vLLM's own environment).
4. Prints the share of proposals that were accepted up to each position, with 95 % intervals over prompts.

How to make vLLM's environment is told in scripts/vllm_draft_model.py.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from layerskip_model.command_line import flag, run_app
from layerskip_model.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    vllm_python: Annotated[str, flag("vllm_python", "the Python of an environment that has vLLM")],
    model: Annotated[str | None, flag("model", "checkpoint directory or hub name")] = None,
    run: Annotated[
        str | None, flag("run", "output_dir of a finished run that trained heads, not --model")
    ] = None,
    draft: Annotated[str | None, flag("draft", "Medusa heads; default: those of --run")] = None,
    dataset: Annotated[str, flag("dataset", "a JSONL file with prompt or turns, or heldout")] = "heldout",
    num_samples: Annotated[int | None, flag("num_samples", "prompts; default: 32 at most")] = None,
    max_steps: Annotated[int, flag("max_steps", "new tokens a prompt")] = 128,
) -> None:
    """Compare the acceptance of the same drafts in vLLM and here."""
    from eval.decoding.strategies import make_drafter
    from eval.drafts import with_loaded_drafts
    from eval.prompts import dataset_path, encode_prompts, evenly_spaced
    from eval.target import load_target
    from eval.vllm import Engine, compare
    from layerskip_model.formats.medusa_export import export_medusa
    from layerskip_model.jsonl import read_prompts

    engine = Engine(vllm_python, Path(__file__).with_name("vllm_decode.py"))
    engine.require()
    heads = draft or run
    if heads is None:
        raise UserError("--draft is missing: name Medusa heads for --model, or the --run that trained them")
    target = load_target(model, run, dtype="float32")
    settings = with_loaded_drafts(target, "medusa", {"draft": heads, "tree": "chain"})
    drafter = make_drafter("medusa", target.runner, **settings)
    prompts = encode_prompts(target, evenly_spaced(read_prompts(dataset_path(target, dataset)), num_samples))
    with TemporaryDirectory() as place:
        written = export_medusa(heads, "vllm", Path(place))
        speculation = {"method": "medusa", "model": place, "num_speculative_tokens": written.heads}
        words = ("medusa:tree=chain", "the heads")
        found = compare(
            engine, target, drafter, prompts, speculation=speculation, words=words, max_steps=max_steps
        )
    print(*found, sep="\n")


if __name__ == "__main__":
    run_app(app, "python scripts/vllm_medusa.py")
