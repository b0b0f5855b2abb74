"""python -m train RECIPE.yaml [dotted.key=value ...] [--fresh | --dry_run [--ranks N]]"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerskip_model.command_line import run_app
from layerskip_model.errors import UserError

if TYPE_CHECKING:
    from train.config import Recipe

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    recipe: Annotated[
        str, typer.Argument(help="a YAML recipe, for example recipes/quickstart/layerskip.yaml")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="recipe values to replace, optimizer.lr=0.01"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="delete an earlier run in output_dir first")] = False,
    dry: Annotated[
        bool, typer.Option("--dry_run", help="show what would happen; load nothing, write nothing")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="processes of a dry run; default: those launched")
    ] = None,
) -> None:
    """Train a recipe, or go on with an interrupted run of it. Launch with accelerate or torchrun on many devices."""
    from train.recipe_file import read_recipe_file

    values = read_recipe_file(recipe, overrides)  # a typing error need not wait for torch
    from train.config import parse_recipe

    checked = parse_recipe(values, origin=recipe)
    if dry:
        show(checked, ranks)
        return
    if ranks is not None:
        raise UserError(
            f"--ranks {ranks} is for --dry_run; a launcher such as torchrun starts the processes of a run"
        )
    from train.loop import train
    from train.stop import Interrupted

    try:
        train(checked, fresh=fresh)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(130) from None


def show(recipe: Recipe[Any], ranks: int | None) -> None:
    """The dry run, on the first process of a launch."""
    if int(os.environ.get("RANK", "0")) == 0:
        from rich.console import Console

        from train.dry_run import dry_run

        dry_run(recipe, ranks or int(os.environ.get("WORLD_SIZE", "1")), Console(highlight=False))


if __name__ == "__main__":
    run_app(app, "python -m train")
