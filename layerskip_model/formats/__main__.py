"""python -m layerskip_model.formats export --to draft_model --exit_layer E MODEL OUT"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from layerskip_model.command_line import flag, new_directory, run_app
from layerskip_model.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def formats() -> None:
    """Checkpoints in the forms that other programs read."""


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="checkpoint directory or hub name")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="directory to write, new or empty")],
    to: Annotated[
        str, flag("to", "draft_model: the first layers with norm and LM head, as a model of their own")
    ],
    exit_layer: Annotated[int, flag("exit_layer", "E: the layers of the draft model")],
) -> None:
    """Write a checkpoint in a form that other engines load."""
    if to != "draft_model":
        raise UserError(f"--to '{to}' is no format that can be written; give draft_model")
    from layerskip_model.formats.draft_model import export_draft_model

    with new_directory(out) as place:
        written = export_draft_model(model, exit_layer, place)
    dtype = str(written.dtype).removeprefix("torch.")
    print(
        f"{out}: the first {written.exit_layer} of {written.num_layers} layers of {model} with its norm and LM head, "
        f"{written.parameters:,} parameters in {dtype}, {written.bytes / 1e6:,.1f} MB"
    )
    speculation = {"method": "draft_model", "model": out, "num_speculative_tokens": 4}
    print(f"vLLM: vllm serve {model} --speculative-config '{json.dumps(speculation)}'")


if __name__ == "__main__":
    run_app(app, "python -m layerskip_model.formats")
