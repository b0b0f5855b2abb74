"""The strategies of one benchmark, ours and transformers' own, behind one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from eval import peers
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import ALIASES, STRATEGIES, make_drafter
from eval.target import Target
from layerskip_model.errors import UserError

PEERS: dict[str, tuple[Callable[..., peers.Decode], str, tuple[str, ...]]] = {
    "hf_generate": (peers.hf_generate, "transformers generate", ()),
    "hf_early_exit": (peers.hf_early_exit, "transformers early exit", ("exit_layer", "num_speculations")),
}
"""name -> (maker, label, settings it needs)"""


def contestant_name(name: str) -> str:
    """The name that a strategy has in a report, aliases resolved. Raises UserError for an unknown one."""
    known = [*STRATEGIES, *PEERS]
    found = ALIASES.get(name, name)
    if found not in known:
        close = get_close_matches(name, [*known, *ALIASES], n=1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        raise UserError(f"unknown strategy '{name}'{hint}; there are {', '.join(known)}")
    return found


@dataclass(frozen=True)
class Contestant:
    """One row of the table: decodes one prompt at a time, greedily."""

    name: str
    label: str
    settings: dict[str, Any]
    decode: Callable[[list[int]], Generation]
    ours: bool


def make_contestant(name: str, target: Target, max_new_tokens: int, given: dict[str, Any]) -> Contestant:
    """The strategy of that name with those of the `given` settings that it takes.

    The baseline, autoregressive, always runs the whole model. Raises UserError for an unknown name and for
    missing or impossible settings.
    """
    name = contestant_name(name)
    if name in PEERS:
        make, label, needs = PEERS[name]
        missing = [key for key in needs if given.get(key) is None]
        if missing:
            raise UserError(f"{name} needs {missing[0]}; give --{missing[0]} a value")
        settings = {key: given[key] for key in needs}
        if needs:
            make_drafter("self_speculative", target.runner, **settings)  # the same settings, the same limits
        return Contestant(name, label, settings, make(target, max_new_tokens, **settings), ours=False)
    fields = {field.name for field in dataclasses.fields(STRATEGIES[name].Settings)}
    settings = {key: value for key, value in given.items() if key in fields and value is not None}
    if name == "autoregressive":
        settings = {}
    drafter = make_drafter(name, target.runner, **settings)

    def run(prompt: list[int]) -> Generation:
        fresh = make_drafter(name, target.runner, **settings)
        eos = target.eos_token_ids
        return decode(target.runner, fresh, [prompt], max_new_tokens=max_new_tokens, eos_token_ids=eos)[0]

    shown = {key: value for key, value in dataclasses.asdict(drafter.settings).items() if value is not None}
    return Contestant(name, name.replace("_", " "), shown, run, ours=True)
