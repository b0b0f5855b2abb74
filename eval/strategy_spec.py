"""Entries of `--strategies`: a strategy, ours or transformers' own, with settings that are its alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_type_hints

from eval import peers
from eval.decoding.settings import from_text, make_settings, nearest, spoken
from eval.decoding.strategies import ALIASES, STRATEGIES
from eval.draft_heads import has_tree
from layerskip_model.errors import UserError

if TYPE_CHECKING:
    from eval.target import Target

BASELINE = "autoregressive"
EXITS = "self_speculative"
SAME_HEADS = {"eagle2": ("eagle",)}
"""strategy -> others that draft with the same heads"""


@dataclass(frozen=True)
class Peer:
    """A strategy of transformers' own.

    Attributes:
        make: (target, max_new_tokens, choosing, **settings) -> what decodes with it.
        label: its name in a table.
        ours: the strategy of ours that does the same; it lends its types, ranges and defaults of settings.
        takes: the settings of ours that it has.
        one_prompt_only: why it takes part at batch size 1 only; "" where it does at any.
    """

    make: Callable[..., peers.Decode]
    label: str
    ours: str
    takes: tuple[str, ...] = ()
    one_prompt_only: str = "transformers drafts for one prompt at a time"


PEERS: dict[str, Peer] = {
    "hf_generate": Peer(peers.hf_generate, "transformers generate", BASELINE, one_prompt_only=""),
    "hf_early_exit": Peer(
        peers.hf_early_exit, "transformers early exit", EXITS, ("exit_layer", "num_speculations")
    ),
    "hf_assisted": Peer(
        peers.hf_assisted, "transformers assisted", "speculative_sampling", ("draft", "num_speculations")
    ),
    "hf_prompt_lookup": Peer(
        peers.hf_prompt_lookup,
        "transformers prompt lookup",
        "prompt_lookup",
        ("max_ngram", "num_speculations"),
    ),
}


@dataclass(frozen=True)
class Spec:
    """An entry of `--strategies`: NAME[:KEY=VALUE]..., a KEY alone for True."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = (key if value is True else f"{key}={value}" for key, value in self.settings.items())
        return ":".join([self.name, *given])


def parse_spec(text: str) -> Spec:
    """The entry that `text` stands for, its values of the settings' types. Raises UserError.

    The ranges of numbers depend on the model, and are checked when the strategy is made for one.
    """
    name, *parts = (part.strip() for part in text.split(":"))
    name = known_name(name)
    types = setting_types(name)
    settings: dict[str, Any] = {}
    for part in parts:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in types:
            known = ", ".join(types) or "none"
            raise UserError(
                f"--strategies '{text}': {name} has no setting '{key}'{nearest(key, types)}; its settings: {known}"
            )
        if key in settings:
            raise UserError(f"--strategies '{text}': {key} is given twice; give it once")
        try:
            settings[key] = from_text(value if equals else None, types[key])
        except ValueError:
            raise UserError(
                f"--strategies '{text}': '{part}' is not valid; give {key}={spoken(types[key])}"
            ) from None
    return Spec(name, settings)


def known_name(name: str) -> str:
    """The name under which a strategy, ours or a peer, is known; aliases resolved. Raises UserError."""
    found = ALIASES.get(name, name)
    known = [*STRATEGIES, *PEERS]
    if found not in known:
        hint = nearest(name, [*known, *ALIASES])
        raise UserError(f"unknown strategy '{name}'{hint}; there are {', '.join(known)}")
    return found


def setting_types(name: str) -> dict[str, Any]:
    """The settings that an entry of this name takes, with their types. The baseline is the whole model, as it is."""
    if name == BASELINE:
        return {}
    peer = PEERS.get(name)
    kind = STRATEGIES[peer.ours if peer else name].Settings
    types = get_type_hints(kind)
    return {
        key: types[key] for key in (peer.takes if peer else [one.name for one in dataclasses.fields(kind)])
    }


def check_given(specs: Sequence[Spec], given: dict[str, Any]) -> None:
    """Raises UserError for a setting, given for all entries, that none of them takes."""
    for key, value in given.items():
        if not any(key in setting_types(spec.name) for spec in specs):
            able = [name for name in (*STRATEGIES, *PEERS) if key in setting_types(name)]
            fix = f"it is for {', '.join(able)}" if able else "no strategy has it"
            raise UserError(f"--{key} {value}: none of the --strategies takes it; {fix}")


def settings_for(spec: Spec, target: Target, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of an entry: its own, else those given for all, else what the target's run suggests.

    What is named in them is as it was given: `eval.drafts.with_loaded_drafts` loads it.
    """
    ours = PEERS[spec.name].ours if spec.name in PEERS else spec.name
    types = setting_types(spec.name)
    own = given | spec.settings
    found = suggested(target, ours, own) | own
    return {key: value for key, value in found.items() if key in types}


def suggested(target: Target, strategy: str, given: dict[str, Any]) -> dict[str, Any]:
    """What the target's run suggests for a strategy of ours: nothing but for the one that it was made for.

    Its heads for others that draft with the same. How deep heads should draft is about what they draft by default;
    other heads, and a tree that is given or lies beside them, have a depth of their own.
    """
    run = target.run
    if run is None:
        return {}
    if run.strategy != strategy:
        return {"draft": str(run.heads)} if strategy in SAME_HEADS.get(run.strategy, ()) else {}
    found = dict(run.suggested)
    if {"draft", "tree"} & given.keys() or (run.heads is not None and has_tree(run.heads)):
        found.pop("num_speculations", None)
    return found


def peer_settings(name: str, target: Target, values: dict[str, Any]) -> dict[str, Any]:
    """A peer's settings, checked and completed as ours are in the strategy that does the same. Raises UserError."""
    peer = PEERS[name]
    ours = STRATEGIES[peer.ours]
    complete = make_settings(name, ours.Settings, ours.ranges(target.runner), values)
    return {key: getattr(complete, key) for key in peer.takes}
