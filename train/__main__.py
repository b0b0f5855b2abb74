"""python -m train RECIPE.yaml [dotted.key=value ...] [--fresh]"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from eval.command_line import run_app

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
) -> None:
    """Train a recipe, or go on with an interrupted run of it. Launch with accelerate or torchrun on many devices."""
    from train.recipe_file import read_recipe_file

    values = read_recipe_file(recipe, overrides)  # a typing error need not wait for torch
    from train.config import parse_recipe

    checked = parse_recipe(values, origin=recipe)
    from train.loop import train
    from train.stop import Interrupted

    try:
        train(checked, fresh=fresh)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    run_app(app, "python -m train")
