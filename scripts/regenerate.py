"""python -m scripts.regenerate --model BASE --dataset PROMPTS --output_dir DIR: training data by the model itself.

Drafting heads learn best from what their own model writes (Medusa, arXiv 2401.10774, section 2.3.2). Runs from the
root of a clone, as recipes do, and on many GPUs with torchrun or accelerate launch: docs/regenerated-data.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eval.command_line import output_directory, truth
from eval.flags import ChoosingFlags, Drafting, Loading, given, with_flags
from layerskip_model.command_line import flag, run_app
from layerskip_model.errors import UserError

if TYPE_CHECKING:
    from eval.answer_writers import AnswerWriter
    from eval.questions import Question
    from eval.target import Target
    from train.data.questions import Asked

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@with_flags
def main(
    *,
    loading: Loading,
    dataset: Annotated[
        str,
        flag(
            "dataset",
            "a JSONL file with messages, conversations, turns, prompt or text; or a recipe, whose training data is "
            "asked and nothing that it holds out",
        ),
    ],
    output_dir: Annotated[str, flag("output_dir", "where rows.jsonl and manifest.json go")],
    chat_template: Annotated[
        str | None,
        flag("chat_template", "a Jinja file that writes conversations; default: the recipe's or tokenizer's"),
    ] = None,
    num_samples: Annotated[
        int | None, flag("num_samples", "prompts, evenly spaced over the data; default: all")
    ] = None,
    max_steps: Annotated[int, flag("max_steps", "new tokens of an answer at most")] = 512,
    batch_size: Annotated[int, flag("batch_size", "prompts answered together")] = 32,
    generation_strategy: Annotated[
        str, flag("generation_strategy", "how it is decoded; all of them write the same answers")
    ] = "autoregressive",
    drafting: Drafting,
    sample: Annotated[
        str, flag("sample", "True: draw tokens; False: always the most likely", metavar="TRUE|FALSE")
    ] = "False",
    choosing: ChoosingFlags,
    command: Annotated[
        str | None, flag("command", "a program that answers JSON lines, in place of a --model")
    ] = None,
    fresh: Annotated[bool, flag("fresh", "delete earlier answers in --output_dir first")] = False,
) -> None:
    """Let a model answer the prompts of a data set, for recipes to train on.

    Ended at any time, the same command goes on.
    """
    from eval.answer_writers import CommandWriter
    from eval.choosing import Choosing
    from eval.decoding.strategies import strategy_name
    from eval.ranks import join_ranks
    from eval.regenerate import ROWS, regenerate
    from train.data.questions import read_asked

    strategy = strategy_name(generation_strategy)  # before a large model is loaded
    chosen = Choosing(truth(sample), **given(choosing))
    if command is not None:
        flags = given(loading) | given(drafting) | chosen.given | ({"sample": True} if chosen.sample else {})
        refuse_beside(command, flags | ({} if chat_template is None else {"chat_template": chat_template}))
    ranks = join_ranks()
    with ranks.together(), output_directory(output_dir if ranks.is_first else None):
        # 1. What is asked.
        asked = read_asked(dataset)
        if chat_template is not None and not asked.has_conversations:
            raise UserError(
                f"--chat_template '{chat_template}': '{dataset}' has no conversations; leave it out"
            )
        questions = questions_of(asked, num_samples)
        # 2. Who answers.
        writer: AnswerWriter
        if command is not None:
            writer = CommandWriter(command, max_steps)
        else:
            target = loading.load(device=ranks.device(loading.device, loading.device_map))
            settings = {"max_new_tokens": max_steps, "choosing": chosen, **given(drafting)}
            writer = model_writer(target, asked, chat_template, strategy, settings)
        # 3. The answers.
        manifest = regenerate(
            questions,
            writer,
            Path(output_dir),
            about={"model": loading.model or loading.run or command, "dataset": dataset},
            batch_size=batch_size,
            fresh=fresh,
            ranks=ranks,
        )
    if ranks.is_first:
        tell(Path(output_dir) / ROWS, manifest, asked.has_conversations)


def questions_of(asked: Asked, number: int | None) -> list[Question]:
    """So many of the questions, evenly spaced; None for all."""
    from eval.prompts import evenly_spaced
    from eval.questions import question_of

    documents = evenly_spaced(asked.documents, len(asked.documents) if number is None else number)
    return [question_of(one.name, getattr(one, "messages", one.text)) for one in documents]


def model_writer(
    target: Target, asked: Asked, chat_template: str | None, strategy: str, settings: dict[str, Any]
) -> AnswerWriter:
    """A model that answers with that strategy; conversations by a chat template. Raises UserError."""
    from eval.answer_writers import ModelWriter
    from layerskip_model.chat import ChatTemplate

    template = None
    if asked.has_conversations:
        path = chat_template or asked.chat_template
        template = ChatTemplate.load(target.tokenizer, path, "--chat_template")
    return ModelWriter.make(target, template, strategy, **settings)


def refuse_beside(command: str, flags: dict[str, Any]) -> None:
    """Raises UserError for a flag that says how a model is decoded here."""
    for name, value in flags.items():
        if name != "seed":
            raise UserError(
                f"--{name} {value} with --command '{command}': it is the command's business; leave it out"
            )


def tell(rows: Path, manifest: dict[str, Any] | None, has_conversations: bool) -> None:
    """Say what there is now, and how a recipe reads it."""
    if manifest is None:
        print(f"{rows}: is complete; to start anew give --fresh")
    else:
        counts = manifest["counts"]
        parts = [f"{counts['rows']:,} rows of {counts['questions']:,}", f"{counts['tokens']:,} tokens"]
        parts += [f"answers ended by {reason}: {n:,}" for reason, n in counts["answers_ended_by"].items()]
        parts += [f"skipped since {reason}: {n:,}" for reason, n in counts["skipped"].items()]
        print(f"{rows}: {', '.join(parts)}")
    form = "conversation: messages" if has_conversations else "pair: {prompt: prompt, response: response}"
    print(f'in a recipe: data.train: [{{kind: jsonl, files: ["{rows}"], {form}}}]')


if __name__ == "__main__":
    run_app(app, "python -m scripts.regenerate", speaks=os.environ.get("RANK", "0") == "0")
