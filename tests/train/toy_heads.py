"""A toy method that uses all of the objective's contract: two small heads on a frozen model.

Head k predicts the token k + 1 places ahead, so each has its own number of tokens. It learns from hidden states
that come with the batch, or computes them; it draws dropout from torch's generator.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.head_map import HeadMap
from layerskip_model.token_loss import IGNORE_INDEX, cross_entropy_sum
from train.data.packing import Rows
from train.metrics import Metrics
from train.objectives.base import Batch, Objective
from train.section import Section


class ToyConfig(Section):
    """`objective: {kind: toy_heads, ...}`."""

    kind: Literal["toy_heads"]
    cached: bool = Field(False, description="learn from hidden states computed beforehand")
    dropout: float = 0.0


class CachedRows:
    """Windows of tokens with the frozen model's hidden states beside them."""

    def __init__(self, windows: Rows, backbone: Backbone) -> None:
        self.windows = windows
        with torch.no_grad():
            rows = [windows[row]["input_ids"] for row in range(len(windows))]
            self.hidden = [backbone.final_states(row[None])[0] for row in rows]  # [seq, hidden] each

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.windows[row] | {"hidden": self.hidden[row]}


def summed(states: Tensor, head: HeadMap, *, labels: Tensor) -> Tensor:
    return cross_entropy_sum(states, labels, head)


class ToyHeads(Objective[ToyConfig]):
    """Two heads; `built` is the last one made, for tests to look into."""

    config_class: ClassVar[type[Section]] = ToyConfig
    built: ClassVar[ToyHeads]
    kinds_of_batch: ClassVar[set[tuple[bool, bool]]] = set()  # (training, with hidden states)

    def __init__(self, model: PreTrainedModel, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.model = model.requires_grad_(False)
        self.backbone = Backbone(model)
        size = self.backbone.hidden_size
        self.heads = nn.ModuleList(nn.Linear(size, size) for _ in range(2))
        self.frozen_before = {name: value.clone() for name, value in model.state_dict().items()}
        self.heads_before = {name: value.clone() for name, value in self.heads.state_dict().items()}
        ToyHeads.built = self
        ToyHeads.kinds_of_batch.clear()

    @classmethod
    def build(cls, recipe: Any, model: PreTrainedModel) -> Self:
        return cls(model, recipe.objective)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.model.eval()
        return self

    def learning_rate_multiple(self, name: str) -> float:
        return 0.5 if name.startswith("heads.1.") else 1.0

    def rows(self, windows: Rows, part: Literal["train", "heldout"]) -> Rows:
        return CachedRows(windows, self.backbone) if self.config.cached and part == "train" else windows

    def labels(self, batch: Batch) -> dict[str, Tensor]:
        """Head -> the tokens it has to predict, [batch, seq]."""
        next_token = batch["labels"]
        filler = torch.full_like(next_token[:, :1], IGNORE_INDEX)
        return {"head_0": next_token, "head_1": torch.cat([next_token[:, 1:], filler], dim=1)}

    def count(self, batch: Batch) -> dict[str, int]:
        return {name: int((labels != IGNORE_INDEX).sum()) for name, labels in self.labels(batch).items()}

    def forward(self, batch: Batch, step: int, denominators: dict[str, float]) -> tuple[Tensor, Metrics]:
        assert isinstance(batch["row"], list)
        ToyHeads.kinds_of_batch.add((self.training, "hidden" in batch))
        hidden = batch["hidden"] if "hidden" in batch else self.online(batch)  # [batch, seq, hidden]
        metrics: Metrics = {}
        parts = []
        for head, (name, labels) in zip(self.heads, self.labels(batch).items(), strict=True):
            states = hidden + functional.dropout(head(hidden), self.config.dropout, self.training)
            flat = labels.flatten()
            loss = self.backbone.at_head(states.flatten(0, 1), partial(summed, labels=flat))
            metrics[f"{name}/loss"] = (loss, (flat != IGNORE_INDEX).sum())
            parts.append(loss / denominators[name])
        return sum(parts, torch.zeros(())), metrics | {"loss": metrics["head_0/loss"]}

    @torch.no_grad()
    def online(self, batch: Batch) -> Tensor:
        return self.backbone.final_states(batch["input_ids"])

    def export(
        self, directory: Path, state: dict[str, Tensor], dtype: torch.dtype, heldout: dict[str, float]
    ) -> None:
        prefix = "heads."
        heads = {
            name.removeprefix(prefix): t.to(dtype) for name, t in state.items() if name.startswith(prefix)
        }
        save_file(heads, directory / "heads.safetensors")

    def suggestion(self, heldout: dict[str, float], written: Any, fixed: dict[str, int]) -> dict[str, Any]:
        return {"strategy": "toy", "settings": {"loss": heldout["loss"]}}
