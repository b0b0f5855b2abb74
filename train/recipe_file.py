"""A recipe's YAML file and the overrides from the command line, as nested dicts. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from layerskip_model.errors import UserError


def read_recipe_file(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Read YAML, replace the values that `dotted.key=value` overrides name, then resolve `${...}`.

    A mapping or list in an override replaces the whole old value; `data.train.0.kind=text` reaches into lists.
    Raises UserError, one line, for a file or an override that cannot be read.
    """
    recipe = _load(Path(path))
    for override in overrides or []:
        _apply(recipe, override)
    try:
        values = OmegaConf.to_container(recipe, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"recipe {path}: {_one_line(error)}") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _load(path: Path) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.y*ml"))[:5]) if path.name else ""
        raise UserError(f"recipe {path}: no such file" + (f"; there is {near}" if near else "")) from None
    except IsADirectoryError:
        raise UserError(f"recipe {path}: is a directory; name a YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read ({_one_line(error)})") from None
    try:
        recipe = OmegaConf.create(text)
    except AssertionError:  # OmegaConf's answer to a file that holds a single number
        recipe = None
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"recipe {path}: not valid YAML ({_one_line(error)})") from None
    if not isinstance(recipe, DictConfig):
        raise UserError(f"recipe {path}: must be a mapping of keys to values")
    if not recipe:
        raise UserError(f"recipe {path}: is empty")
    return recipe


def _apply(recipe: DictConfig, override: str) -> None:
    """Put one `dotted.key=value` into the recipe."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"override '{override}': write it as key=value, for example optimizer.lr=0.01")
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        OmegaConf.update(recipe, key, parsed["value"], merge=False)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"override '{override}': {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    """What is wrong and where, without the extra lines that YAML's and OmegaConf's messages have."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        text = f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    elif isinstance(error, OmegaConfBaseException):
        text = f"{error.full_key + ': ' if error.full_key else ''}{str(error).splitlines()[0]}"
    else:
        text = str(error)
    return " ".join(text.split())[:300] or type(error).__name__
