"""The strategies by name, and the checks of their settings."""

from __future__ import annotations

from typing import Any

from eval.decoding.drafters.autoregressive import Autoregressive
from eval.decoding.drafters.base import Drafter
from eval.decoding.drafters.eagle import Eagle
from eval.decoding.drafters.eagle2 import Eagle2, Eagle3
from eval.decoding.drafters.hydra import Hydra
from eval.decoding.drafters.lookahead import Lookahead
from eval.decoding.drafters.medusa import Medusa
from eval.decoding.drafters.prompt_lookup import PromptLookup
from eval.decoding.drafters.self_speculative import SelfSpeculative
from eval.decoding.drafters.speculative_sampling import SpeculativeSampling
from eval.decoding.settings import make_settings, nearest
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner

STRATEGIES: dict[str, type[Drafter]] = {
    "autoregressive": Autoregressive,
    "self_speculative": SelfSpeculative,
    "speculative_sampling": SpeculativeSampling,
    "prompt_lookup": PromptLookup,
    "lookahead": Lookahead,
    "medusa": Medusa,
    "hydra": Hydra,
    "eagle": Eagle,
    "eagle2": Eagle2,
    "eagle3": Eagle3,
}
ALIASES = {"greedy": "autoregressive"}


def strategy_name(name: str) -> str:
    """The name under which a strategy is known, aliases resolved. Raises UserError for an unknown one."""
    known = ALIASES.get(name, name)
    if known not in STRATEGIES:
        hint = nearest(name, [*STRATEGIES, *ALIASES])
        raise UserError(f"unknown strategy '{name}'{hint}; there are {', '.join(STRATEGIES)}")
    return known


def make_drafter(name: str, runner: Runner, **settings: Any) -> Drafter:
    """The drafter of that name with these settings.

    Raises UserError for an unknown name or setting, and for a missing, mistyped or out-of-range value.
    """
    name = strategy_name(name)
    strategy = STRATEGIES[name]
    return strategy(runner, make_settings(name, strategy.Settings, strategy.ranges(runner), settings))
