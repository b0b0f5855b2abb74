"""python -m train RECIPE.yaml [dotted.key=value ...] [--fresh]"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from layerskip_model.errors import UserError

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
    from train.config import load_recipe

    checked = load_recipe(recipe, overrides)
    from train.loop import Interrupted, train

    try:
        train(checked, fresh=fresh)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
