"""What the objectives of drafting heads on a frozen model share: what is exported drafts for that model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.decoding.drafters.base import Drafter
from eval.decoding.drafters.heads import DraftHeads
from eval.decoding.static_tree import TreeShape
from eval.decoding.strategies import make_drafter
from eval.replay import OwnText
from layerskip_model.errors import UserError
from layerskip_model.formats.fingerprint import checkpoint_directory, fingerprint
from layerskip_model.formats.heads import heads_directory
from layerskip_model.formats.record import Record, write_record
from layerskip_model.head_probe import Probe
from layerskip_model.head_terms import HeadMeasures
from layerskip_model.runner import Runner
from layerskip_model.token_loss import IGNORE_INDEX
from train.data.packing import Rows
from train.flops import model_flops
from train.metrics import Metrics
from train.objectives.base import Batch, Objective
from train.objectives.self_speculation import COST_PER_ROW
from train.section import FrozenModelSection

OWN = "lm"  # the language model's own term

Config = TypeVar("Config", bound=FrozenModelSection)


class DraftingObjective(Objective[Config], Generic[Config]):
    """Base of the objectives around a module that has `model`, `backbone` and what drafts for them.

    Attributes:
        part: the submodule that is exported.
        length_key: the key of the recipe's `objective` that says how far ahead it learns to guess.
        terms: of the loss, as they are counted and logged.
        strategy: the one to decode with.
        base: the model that it drafts for, as run.json and the export name it.
        longest: how many tokens it drafts in a row at most, as far as that is measured.
    """

    part: ClassVar[str]
    length_key: ClassVar[str]
    terms: list[str]
    strategy: str

    def __init__(self, module: nn.Module, config: Config, base: str, longest: int) -> None:
        super().__init__()
        self.module: Any = module
        self.config = config
        self.base = base
        self.longest = longest
        self.flops = model_flops(self.module.model)  # now, as an engine may take the matrices apart

    @abstractmethod
    def labels(self, batch: Batch) -> Tensor:
        """Labels of each term, IGNORE_INDEX where it has none; the batch is on the host. [terms, batch, places]."""

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many places have a label, for each term."""
        counts = (self.labels(batch) != IGNORE_INDEX).flatten(1).sum(1).tolist()
        return dict(zip(self.terms, counts, strict=True))

    def rows(self, windows: Rows, part: Literal["train", "heldout"]) -> Rows:
        """The windows as they are. Raises UserError where some term has nothing to learn from in any of them."""
        missing = set(self.terms) if part == "train" and len(windows) else set()
        for row in range(len(windows)):
            if not missing:
                return windows
            batch = {key: values[None] for key, values in windows[row].items()}
            missing -= {term for term, count in self.counts(batch).items() if count}
        if missing:
            last = min(missing, key=self.terms.index)
            raise UserError(
                f"data.train: no label counts for {last}: no text has so many tokens that count; give longer ones, "
                f"a longer batch.length or fewer objective.{self.length_key} than {self.longest}"
            )
        return windows

    @abstractmethod
    def write_heads(
        self, directory: Path, state: dict[str, Tensor], *, dtype: torch.dtype, base_fingerprint: str
    ) -> None:
        """Write them in their format into a directory that is there; `state` is their own state_dict."""

    @abstractmethod
    def flops_of(self, counts: dict[str, int], sequences: int, length: int) -> float:
        """FLOPs of a step for so many tokens that count in each term. Without any: of the model alone."""

    def export(
        self, directory: Path, state: dict[str, Tensor], dtype: torch.dtype, heldout: dict[str, float]
    ) -> None:
        """The heads, and what is known of them."""
        self.write_heads(
            directory,
            inside(state, f"module.{self.part}."),
            dtype=dtype,
            base_fingerprint=fingerprint(checkpoint_directory(self.base)),
        )
        write_record(directory, Record.of(heldout, self.probe(dtype)))

    def probe(self, dtype: torch.dtype) -> Probe | None:
        """What the heads say now, for whoever loads them rounded to `dtype`. Default: nothing is asked."""
        return None

    def exported_heads(self) -> str:
        """The export is nothing but the heads."""
        return "."

    def suggestion(
        self, heldout: dict[str, float], written: OwnText | None, fixed: dict[str, int]
    ) -> dict[str, Any]:
        """The heads' chain of first choices, as long as it pays.

        By decoding with every length of it; where nothing was written all of it, by its acceptance on held-out text.
        """
        if written is None:
            speedup = heldout.get("acceptance_length", 1.0) / _cost(self.longest)
            return {"strategy": self.strategy, "settings": {}, "predicted_speedup": speedup}
        longest = self.longest
        depths = [min(fixed["num_speculations"], longest)] if fixed else range(1, longest + 1)
        tried = []
        for depth in depths:
            one: dict[str, Any] = {"strategy": self.strategy, "settings": {"num_speculations": depth}}
            decoded = written.decoded(self.drafter(one, written.runner))
            won = [length for generation in decoded for length in generation.accepted_lengths]
            length = sum(won) / len(won) if won else 1.0
            one |= {"predicted_speedup": length / _cost(depth), "acceptance_length": length}
            tried.append(one)
        return max(tried, key=lambda one: one["predicted_speedup"])

    def decodable(self) -> PreTrainedModel:
        """The model that the heads are for."""
        return self.module.model

    @abstractmethod
    def draft(self, name: str, tree: TreeShape, runner: Runner) -> DraftHeads:
        """The heads in training, as decoding has them; `runner` runs their model. Raises UserError."""

    def drafter(self, suggestion: dict[str, Any], runner: Runner) -> Drafter:
        """The strategy with the heads in training, whose tree is a chain."""
        draft = self.draft("the heads in training", TreeShape.chain(self.longest), runner)
        return make_drafter(suggestion["strategy"], runner, draft=draft, **suggestion["settings"])


def measured(found: HeadMeasures, terms: Sequence[str]) -> Metrics:
    """What evaluation logs of each term, the language model's own first, and of the chain of first choices."""
    metrics: Metrics = {}
    for k, term in enumerate(terms):
        count = found.counts[k]
        metrics[f"{term}/loss"] = (found.losses[k], count)
        metrics[f"{term}/top1"] = (found.top1[k], count)
        metrics[f"{term}/top5"] = (found.top5[k], count)
        if k:
            metrics[f"{term}/agreement"] = (found.agreement[k], count)
        if k and found.divergences is not None:
            metrics[f"{term}/divergence"] = (found.divergences[k - 1], count)
    return metrics | {"acceptance_length": (found.accepted, found.places)}


def _cost(depth: int) -> float:
    """Of verifying a chain so deep, over a pass of one row."""
    return 1.0 + COST_PER_ROW * depth


def inside(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state_dict that is one module's."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def check_drafts(recipe: Any, config: Any) -> None:
    """Raise UserError for what a recipe that trains something to draft with cannot have."""
    if recipe.model.name_or_path is None:
        raise UserError(
            f"objective.kind: {config.kind} trains heads of a model that exists; give model.name_or_path"
        )
    if recipe.evaluate.decode is not None and recipe.evaluate.decode.exit_layer is not None:
        raise UserError(
            f"evaluate.decode.exit_layer: objective.kind: {config.kind} drafts with its heads; leave it out"
        )


def place_of_earlier(config: Any) -> Path:
    """Where the heads lie that `init_heads` names. Raises UserError for a run that trained none."""
    try:
        return heads_directory(config.init_heads)
    except UserError as error:
        raise UserError(f"objective.init_heads: {error}") from None


def require_same(config: Any, theirs: dict[str, Any]) -> None:
    """Refuse a recipe for other heads than those that it begins from, whose settings are `theirs`."""
    for name, value in theirs.items():
        if getattr(config, name) != value:
            raise UserError(
                f"objective.{name}: {getattr(config, name)}, and the heads of init_heads '{config.init_heads}' have "
                f"{value}; give that"
            )
