"""What an EAGLE head computes around its layer as a few torch calls; the layer's own are in `fused_layer`."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from layerskip_model.backbone import Backbone
from layerskip_model.eagle import EagleHead
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.fused_layer import Map, fast_norm


class FusedHead:
    """The same maps as those of a head whose layer is fused, over its weights. A `DraftHead` but for the layer.

    Everything has the dtype of the head. For modules that are called by nobody else: what an engine that shards
    weights does when they are called is not done.
    """

    def __init__(self, head: EagleHead | Eagle3Head, backbone: Backbone) -> None:
        self._fc: nn.Linear | None = None
        self._norm: Map | None = None
        if isinstance(head, EagleHead):
            self._fc, self._map = head.fc, backbone.head_map()
        else:
            self._norm, self._map = fast_norm(head.norm), head.projection.map()

    def inputs(self, embedded: Tensor, features: Tensor) -> Tensor:
        """See `DraftHead.inputs`."""
        joined = torch.cat((embedded, features), dim=-1)
        return joined if self._fc is None else F.linear(joined, self._fc.weight, self._fc.bias)

    def logits(self, output: Tensor) -> Tensor:
        """See `DraftHead.logits`."""
        return self._map.logits(output if self._norm is None else self._norm(output))
