"""python -m layerskip_model.formats export --to draft_model --exit_layer E MODEL OUT
python -m layerskip_model.formats export --to medusa|tgi|vllm [--dtype D] HEADS OUT
python -m layerskip_model.formats export --to eagle|vllm|sglang|speculators [--dtype D] HEADS OUT
python -m layerskip_model.formats import --model BASE HEADS OUT
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from layerskip_model.command_line import flag, new_directory, run_app
from layerskip_model.errors import UserError

if TYPE_CHECKING:
    from layerskip_model.formats.eagle_export import EagleWritten
    from layerskip_model.formats.heads import HeadsWritten

DRAFT_MODEL = "draft_model"
MEDUSA = ("medusa", "tgi", "vllm")
EAGLE = ("eagle", "sglang", "speculators", "vllm")
FORMS = (DRAFT_MODEL, *sorted({*MEDUSA, *EAGLE}))
OUT = "directory to write, new or empty"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def formats() -> None:
    """Checkpoints in the forms that other programs read, and theirs in ours."""


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="MODEL|HEADS", help="checkpoint directory, run of heads, or hub name")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help=OUT)],
    to: Annotated[
        str,
        flag(
            "to",
            "draft_model: a model's first layers with norm and LM head, as a model of their own; medusa, tgi, vllm: "
            "Medusa heads as the original repository (and TensorRT-LLM), text-generation-inference or vLLM loads them; "
            "eagle, vllm, sglang, speculators: EAGLE and EAGLE-3 heads as the original repository or these do",
        ),
    ],
    exit_layer: Annotated[int | None, flag("exit_layer", "E: the layers of the draft model")] = None,
    dtype: Annotated[str | None, flag("dtype", "of the heads written; default: as they are stored")] = None,
) -> None:
    """Write a checkpoint in a form that other engines load."""
    if to not in FORMS:
        raise UserError(f"--to '{to}' is no format that can be written; give one of {', '.join(FORMS)}")
    if to == DRAFT_MODEL:
        if exit_layer is None:
            raise UserError(f"--to {to} needs --exit_layer E, how many layers the draft model has")
        if dtype is not None:
            raise UserError(f"--dtype '{dtype}': a draft model keeps the dtype that its model is stored in")
        _export_draft_model(source, out, exit_layer)
    else:
        if exit_layer is not None:
            raise UserError(
                f"--exit_layer {exit_layer} is for --to {DRAFT_MODEL}; heads for --to {to} have none"
            )
        _export_heads(source, out, to, dtype)


@app.command("import")
def import_(
    heads: Annotated[str, typer.Argument(metavar="HEADS", help="released heads: a directory, or a hub name")],
    out: Annotated[str, typer.Argument(metavar="OUT", help=OUT)],
    model: Annotated[
        str, flag("model", "the model that they were trained on: checkpoint directory or hub name")
    ],
) -> None:
    """Write released Medusa, Hydra or EAGLE heads as training writes them, bound to their model by its fingerprint."""
    if _is_eagle(heads):
        from layerskip_model.formats.eagle_import import import_eagle

        with new_directory(out) as place:
            words = _of_eagle(import_eagle(heads, model, place))
    else:
        from layerskip_model.formats.heads_import import import_heads

        with new_directory(out) as place:
            words = _described(import_heads(heads, model, place))
    print(f"{out}: {words} for {model}")


def _export_draft_model(model: str, out: str, exit_layer: int) -> None:
    from layerskip_model.formats.draft_model import export_draft_model

    with new_directory(out) as place:
        written = export_draft_model(model, exit_layer, place)
    dtype = str(written.dtype).removeprefix("torch.")
    print(
        f"{out}: the first {written.exit_layer} of {written.num_layers} layers of {model} with its norm and LM head, "
        f"{written.parameters:,} parameters in {dtype}, {written.bytes / 1e6:,.1f} MB"
    )
    _print_vllm(model, DRAFT_MODEL, out, 4)


def _export_heads(source: str, out: str, to: str, dtype: str | None) -> None:
    is_eagle = _is_eagle(source)
    if to not in (known := EAGLE if is_eagle else MEDUSA):
        kind = "an EAGLE head" if is_eagle else "no EAGLE head"
        raise UserError(f"--to '{to}': heads '{source}' are {kind}; give one of {', '.join(known)}")
    if is_eagle:
        _export_eagle(source, out, to, dtype)
    else:
        _export_medusa(source, out, to, dtype)


def _is_eagle(heads: str) -> bool:
    from layerskip_model.formats.eagle import eagle_kind
    from layerskip_model.formats.heads import heads_directory

    return eagle_kind(heads_directory(heads)) is not None


def _export_eagle(source: str, out: str, to: str, dtype: str | None) -> None:
    from layerskip_model.formats.eagle_export import DRAFTS, export_eagle

    with new_directory(out) as place:
        written = export_eagle(source, to, place, dtype)
    print(f"{out}: {_of_eagle(written)} for {written.base}{written.note and f'; {written.note}'}")
    if to in ("vllm", "speculators"):
        _print_vllm(written.base, written.kind, out, DRAFTS)
    elif to == "sglang":
        print(
            f"SGLang: python -m sglang.launch_server --model-path {written.base} --speculative-algorithm "
            f"{written.kind.upper()} --speculative-draft-model-path {out} --speculative-num-steps {DRAFTS} "
            f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {DRAFTS + 1}"
        )
    else:
        eagle3 = " --use_eagle3" if written.kind == "eagle3" else ""
        print(
            f"EAGLE: python -m eagle.application.webui --base-model-path {written.base} --ea-model-path {out}{eagle3}"
        )


def _export_medusa(source: str, out: str, to: str, dtype: str | None) -> None:
    from layerskip_model.formats.medusa_export import export_medusa

    with new_directory(out) as place:
        written = export_medusa(source, to, place, dtype)
    print(f"{out}: {_described(written)} for {written.base}")
    if to == "vllm":
        _print_vllm(written.base, "medusa", out, written.heads)
    elif to == "tgi":
        print(f"TGI: text-generation-launcher --model-id {out} --speculate {written.heads}")
    else:
        print(f"Medusa: python -m medusa.inference.cli --model {out}")


def _of_eagle(written: EagleWritten) -> str:
    from layerskip_model.formats.eagle_config import NAMES

    dtype = str(written.dtype).removeprefix("torch.")
    size = f"{written.bytes / 1e6:,.1f} MB"
    return f"an {NAMES[written.kind]} head of {written.parameters:,} parameters in {dtype}, {size},"


def _described(written: HeadsWritten) -> str:
    dtype = str(written.dtype).removeprefix("torch.")
    shared = {0: "", 1: ", their projection shared and stored once"}.get(
        written.repeated,
        f", their shared projection stored {written.repeated} times, as this form has one a head",
    )
    blocks = "block" if written.layers == 1 else "blocks"
    size = f"{written.bytes / 1e6:,.1f} MB"
    return f"{written.heads} {written.kind} heads of {written.layers} {blocks} in {dtype}, {size}{shared},"


def _print_vllm(model: str, method: str, out: str, drafts: int) -> None:
    speculation = {"method": method, "model": out, "num_speculative_tokens": drafts}
    print(f"vLLM: vllm serve {model} --speculative-config '{json.dumps(speculation)}'")


if __name__ == "__main__":
    run_app(app, "python -m layerskip_model.formats")
