"""Hydra heads (arXiv 2402.05109): drafting heads that also read the tokens drafted before theirs.

With x_{t+1} predicted by the LM head from the last hidden state h_t, head i (i = 1..K) predicts x_{t+1+i} from
[h_t ; E(x_{t+1}) ; .. ; E(x_{t+i})], E being the model's input embedding. A head is n blocks and a projection to the
vocabulary; its first block takes all of those. Hydra++ first runs the states through a decoder layer of its own
(prefix attention, section 4 of the paper).
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call

from layerskip_model.backbone import Backbone
from layerskip_model.draft_layer import DraftLayer, new_norm
from layerskip_model.medusa import Projection, ResBlock, whole


class FirstBlock(nn.Module):
    """R x + SiLU(W x + b) over `inputs` vectors side by side; begins as `scale` times the first of them.

    R is `res_connection`, with a bias of its own.
    """

    def __init__(self, hidden: int, inputs: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs * hidden, hidden, device=device, dtype=torch.float32)
        self.res_connection = nn.Linear(inputs * hidden, hidden, device=device, dtype=torch.float32)
        self.begin_as_first(1.0)

    def begin_as_first(self, scale: float) -> None:
        """Set the weights that it begins with."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            self.res_connection.weight.diagonal().fill_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs * hidden] -> [..., hidden]."""
        return self.res_connection(x) + F.silu(self.linear(x))


class HydraHeads(nn.Module):
    """K heads, float32 as everything that trains; they read the model's final normed states and its embeddings.

    Attributes:
        prefix: the decoder layer that the states run through first, or None.
        prefix_norm: the norm after it, of the model's kind; `state` applies it.
        blocks: for each head its own n blocks.
        projections: one for each head, or one that all share.
        dropout: how much of what enters a block or a projection is left out in training.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        heads: int,
        layers: int,
        prefix_attention: bool,
        shared: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        head = backbone.head_map()
        shape = (backbone.vocab_size, backbone.hidden_size)
        device = head.weight.device
        self.prefix = DraftLayer(backbone) if prefix_attention else None
        self.prefix_norm = new_norm(backbone) if prefix_attention else None
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                FirstBlock(shape[1], index + 2, device) if layer == 0 else ResBlock(shape[1], device)
                for layer in range(layers)
            )
            for index in range(heads)
        )
        self.projections = nn.ModuleList(
            Projection(head, shape, has_bias=True) for _ in range(1 if shared else heads)
        )
        self.dropout = dropout

    @classmethod
    def new(
        cls,
        backbone: Backbone,
        *,
        heads: int,
        layers: int,
        prefix_attention: bool,
        shared: bool = False,
        dropout: float = 0.0,
    ) -> Self:
        """Heads that say what the LM head says; with prefix attention nearly, whose layer begins small."""
        made = cls(
            backbone,
            heads=heads,
            layers=layers,
            prefix_attention=prefix_attention,
            shared=shared,
            dropout=dropout,
        )
        for projection in made.projections:
            projection.get_parameter("weight").data.copy_(whole(backbone.head.weight))
            if backbone.head.bias is not None:
                projection.get_parameter("bias").data.copy_(whole(backbone.head.bias))
        if prefix_attention and not backbone.head.weight.is_meta:
            # Its norm takes the size of the states away, and the residual connections give it back.
            size = _size_of_normed(backbone)
            for index in range(heads):
                made.first(index).begin_as_first(size)
        return made

    @property
    def number(self) -> int:
        """K."""
        return len(self.blocks)

    @property
    def layers(self) -> int:
        """n, of each head."""
        return len(self._of(0))

    @property
    def shared(self) -> bool:
        """Whether all heads have one projection."""
        return len(self.projections) < self.number

    def first(self, index: int) -> FirstBlock:
        """The first block of head `index`."""
        block = self._of(index)[0]
        assert isinstance(block, FirstBlock)
        return block

    def projection(self, index: int) -> nn.Module:
        """That of head `index` (0..K-1)."""
        return self.projections[0 if self.shared else index]

    def state(self, index: int, hidden: Tensor, path: Tensor) -> Tensor:
        """What head `index` (0..K-1) projects, [..., hidden] in the heads' dtype.

        `hidden` [..., hidden] is the model's final normed state at t, through `prefix` where there is one; `path`
        [..., index + 1, hidden] the model's embeddings of x_{t+1} .. x_{t+1+index}.
        """
        dtype = self.first(index).linear.weight.dtype
        hidden = hidden.to(dtype)
        if self.prefix_norm is not None:
            hidden = self.prefix_norm(hidden)
        state = torch.cat((hidden[..., None, :], path.to(dtype)), dim=-2).flatten(-2)
        for block in self._of(index):
            state = block(F.dropout(state, self.dropout, self.training))
        return F.dropout(state, self.dropout, self.training)

    def logits(self, index: int, hidden: Tensor, path: Tensor) -> Tensor:
        """Of x_{t+2+index}, from the same: [..., vocab]."""
        state = self.state(index, hidden, path)
        return self.projection(index)(state, lambda states, head: head.logits(states))

    def _of(self, index: int) -> nn.ModuleList:
        blocks = self.blocks[index]
        assert isinstance(blocks, nn.ModuleList)
        return blocks


@torch.no_grad()
def _size_of_normed(backbone: Backbone) -> float:
    """The root mean square of what the final norm makes of a vector without a direction of its own."""
    weights = {name: whole(weight) for name, weight in backbone.norm.named_parameters()}
    like = backbone.head.weight
    probe = torch.ones(1, 1, backbone.hidden_size, dtype=torch.float32, device=like.device)
    probe[..., ::2] = -1.0
    return functional_call(backbone.norm, weights, (probe,)).float().square().mean().sqrt().item()
