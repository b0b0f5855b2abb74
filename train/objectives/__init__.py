"""The methods a recipe can name under `objective: {kind: ...}`."""

from __future__ import annotations

from train.objectives.base import Objective
from train.objectives.eagle import Eagle
from train.objectives.eagle3 import Eagle3
from train.objectives.hydra import Hydra
from train.objectives.layerskip import LayerSkip
from train.objectives.medusa import Medusa

OBJECTIVES: dict[str, type[Objective]] = {
    "layerskip": LayerSkip,
    "medusa": Medusa,
    "hydra": Hydra,
    "eagle": Eagle,
    "eagle3": Eagle3,
}
