"""The EAGLE draft head (arXiv 2401.15077; EAGLE-2, 2406.16858, drafts with the same): one layer that makes features.

A feature f_t is the target's state at t as it enters the LM head. From E(x_{t+1}) and f_t the head makes a guess at
f_{t+1}, which the target's LM head turns into logits of x_{t+2}, and which takes the feature's place in the next step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from layerskip_model.backbone import Backbone
from layerskip_model.draft_layer import DraftLayer
from layerskip_model.errors import UserError
from layerskip_model.runner import attention_kinds
from layerskip_model.unrolled import Steps, attending_unrolled


class EagleLayer(DraftLayer):
    """A layer of the target's kind without its input norm, which can also be run for several steps at once."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        attention: Any = getattr(self.layer, "self_attn", None)
        if attention is None:
            raise UserError(
                f"model type '{backbone.model_type}' has layers without 'self_attn', of which no EAGLE head can be "
                "made here; use a model such as Llama, Mistral, Qwen, Gemma, Phi-3 or OLMo"
            )
        if hasattr(self.layer, "input_layernorm"):
            self.layer.input_layernorm = nn.Identity()
        self._config = attention.config = copy.copy(backbone.config)
        _, windows = attention_kinds(backbone.config, backbone.num_layers)
        self._window = windows[self.kind]

    def begin(self, inputs: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Steps]:
        """Step 0, which is `forward`, and what later steps go on from. Shapes as there."""
        if position_ids is None:
            is_whole, position_ids = True, torch.arange(inputs.shape[1], device=inputs.device)[None]
        else:  # looking at them is for nothing on a CPU only
            is_whole = inputs.device.type == "cpu" and bool((position_ids.diff(dim=-1) == 1).all())
        steps = Steps(position_ids, self._window, is_whole=is_whole)
        return self(inputs, position_ids, steps), steps

    def go_on(self, inputs: Tensor, steps: Steps) -> Tensor:
        """The step after those in `steps`, of every place on its own: see `unrolled`. Shapes as in `forward`."""
        inputs = inputs.to(next(self.layer.parameters()).dtype)
        position_ids = steps.position_ids + len(steps.keys)
        with attending_unrolled(self._config):
            output = self.layer(
                inputs,
                attention_mask=None,
                position_ids=position_ids,
                past_key_values=steps,
                use_cache=True,
                position_embeddings=self.rotary(inputs, position_ids),
                steps=steps,
            )
        return output if isinstance(output, Tensor) else output[0]


class DraftHead(Protocol):
    """What EAGLE and EAGLE-3 heads have in common, in training and when they draft.

    Attributes:
        layer: the layer. What leaves it takes the features' place in the next step.
    """

    layer: EagleLayer

    def inputs(self, embedded: Tensor, features: Tensor) -> Tensor:
        """What enters the layer at t, from E(x_{t+1}) and the features of t, each [..., hidden]."""
        ...

    def logits(self, output: Tensor) -> Tensor:
        """From what leaves the layer at t [..., hidden], logits of x_{t+2} over the head's own vocabulary."""
        ...


class EagleHead(nn.Module):
    """fc([E(x_{t+1}) ; f_t]) and a decoder layer, float32 as everything that trains; a `DraftHead`.

    Embedding and LM head are the target's and no part of it. Its features are the target's final normed states. What
    enters a new head's layer is the embedding alone, as in the target: from there on it learns faster than from a
    random mixture.
    """

    def __init__(self, backbone: Backbone, *, bias: bool = True) -> None:
        super().__init__()
        hidden, device = backbone.hidden_size, backbone.head.weight.device
        self.fc = nn.Linear(2 * hidden, hidden, bias=bias, device=device, dtype=torch.float32)
        self.fc.weight.data.copy_(torch.eye(hidden, 2 * hidden))
        if bias:
            self.fc.bias.data.zero_()
        self.layer = EagleLayer(backbone)
        self._backbone = backbone  # no module: its weights are not this one's

    def inputs(self, embedded: Tensor, features: Tensor) -> Tensor:
        """See `DraftHead.inputs`."""
        dtype = self.fc.weight.dtype
        return self.fc(torch.cat((embedded.to(dtype), features.to(dtype)), dim=-1))

    def logits(self, output: Tensor) -> Tensor:
        """See `DraftHead.logits`: by the target's LM head, in its dtype."""
        head = self._backbone.head
        return self._backbone.head_map().squash(head(output.to(head.weight.dtype)))


def unrolled(
    head: DraftHead, embedded: Tensor, features: Tensor, position_ids: Tensor | None, steps: int
) -> Iterator[Tensor]:
    """What leaves the layer in each step, for every place of a text: `steps` times [batch, seq, hidden].

    Step s at t follows x_{t+s+1}; what it says is about x_{t+s+2}. Where the row has no such token any other stands
    there: no other place sees what comes of it.

    Args:
        head: an EAGLE or EAGLE-3 head.
        embedded: the target's embeddings of the tokens one after each place, [batch, seq, hidden].
        features: of each place, [batch, seq, hidden].
        position_ids: of each place, [batch or 1, seq]; they restart with each document. None: each row is one.
        steps: how many, 1 or more.
    """
    output, so_far = head.layer.begin(head.inputs(embedded, features), position_ids)
    yield output
    for _ in range(1, steps):
        embedded = F.pad(embedded[:, 1:], (0, 0, 0, 1))
        output = head.layer.go_on(head.inputs(embedded, output), so_far)
        yield output
