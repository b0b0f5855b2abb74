"""The EAGLE-3 draft head (arXiv 2503.01840): features of three layers fused, own norm, own LM head.

Its features are free: no loss ties them to the target's, so that it can be trained for the steps that it drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerskip_model.backbone import Backbone
from layerskip_model.draft_layer import new_norm
from layerskip_model.eagle import EagleLayer
from layerskip_model.errors import UserError
from layerskip_model.medusa import Projection, whole
from layerskip_model.reduced_vocabulary import ReducedVocabulary

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj")  # of the attention's input; a layer has some of them


def feature_layers(num_layers: int, given: Sequence[int] | None = None) -> tuple[int, int, int]:
    """The layers, counted from 0, whose inputs are a head's features: as given, else 2, L/2 and L-3.

    Raises UserError unless they are three different ones of layers 1..L-1, in order.
    """
    usual = [2, num_layers // 2, num_layers - 3]
    layers = usual if given is None else list(given)
    if len(layers) == 3 and 1 <= layers[0] < layers[1] < layers[2] < num_layers:
        return layers[0], layers[1], layers[2]
    fix = "it is too shallow for EAGLE-3; use EAGLE"
    if num_layers >= 4:
        example = usual if 2 < usual[1] < usual[2] else [1, num_layers // 2, num_layers - 1]
        fix = f"give three of 1 to {num_layers - 1} in order, such as {example}"
    raise UserError(
        f"feature_layers: {layers} are not three different layers in order of a model of {num_layers}; {fix}"
    )


class JoinedAttention(nn.Module):
    """The target's attention over [norm(E) ; norm(h)], twice as wide as its own input.

    `is_normed`: what it is given is norm(h) already.
    """

    def __init__(self, attention: nn.Module, backbone: Backbone, *, is_normed: bool) -> None:
        super().__init__()
        self.is_normed = is_normed
        found = [name for name in PROJECTIONS if hasattr(attention, name)]
        if not found:
            raise UserError(
                f"model type '{backbone.model_type}' has none of {', '.join(PROJECTIONS)} in its attention, so that "
                "no EAGLE-3 head can be made here; use a model such as Llama, Mistral, Qwen, Gemma, Phi-3 or OLMo"
            )
        for name in found:
            old = attention.get_submodule(name)
            assert isinstance(old, nn.Linear)
            wide = nn.Linear(
                2 * old.in_features,
                old.out_features,
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
            )
            wide.apply(backbone.model._init_weights)
            setattr(attention, name, wide)
        self.attention = attention
        self.input_layernorm = new_norm(backbone)
        self.hidden_norm = new_norm(backbone)

    def forward(self, hidden_states: Tensor, embedded: Tensor, **kwargs: Any) -> Any:
        """As the attention's own; `embedded` is as wide as `hidden_states`."""
        normed = hidden_states if self.is_normed else self.hidden_norm(hidden_states)
        joined = torch.cat((self.input_layernorm(embedded), normed), dim=-1)
        return self.attention(hidden_states=joined, **kwargs)


class JoinedLayer(nn.Module):
    """A decoder layer around `JoinedAttention`, its residual on the second half of what it is given.

    Attributes:
        norm_before_residual: whether the residual is on norm(h) instead of h.
    """

    def __init__(self, layer: nn.Module, backbone: Backbone, *, norm_before_residual: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.norm_before_residual = norm_before_residual
        attention = layer.get_submodule("self_attn")
        layer.self_attn = JoinedAttention(attention, backbone, is_normed=norm_before_residual)
        if norm_before_residual:
            # By a hook, as engines that shard weights have the norm's while the layer runs.
            layer.register_forward_pre_hook(_normed_first)

    def forward(self, inputs: Tensor, **kwargs: Any) -> Any:
        """[batch, rows, 2 * hidden], embeddings first -> what the layer returns."""
        embedded, hidden = inputs.chunk(2, dim=-1)
        return self.layer(hidden, embedded=embedded, **kwargs)


def _normed_first(layer: nn.Module, args: tuple[Tensor]) -> Tensor:
    """norm(h) enters the layer in place of h."""
    return layer.get_submodule("self_attn.hidden_norm")(args[0])


class Eagle3Head(nn.Module):
    """Fusion, layer, norm and LM head, float32 as everything that trains; a `DraftHead`.

    Its LM head begins as the target's over its vocabulary, and its norm as the target's final one.

    Attributes:
        reads: the three layers whose inputs are fused.
        d2t, t2d: the tokens that it can say, as in `ReducedVocabulary`.

    `norm_before_residual` is false in the paper and in all heads that are trained here first; see `JoinedLayer`. Raises
    UserError for layers as `feature_layers` does, and for a target of whose layer it cannot be made.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(
        self,
        backbone: Backbone,
        vocabulary: ReducedVocabulary,
        reads: Sequence[int] | None = None,
        *,
        norm_before_residual: bool = False,
    ) -> None:
        super().__init__()
        self.reads = feature_layers(backbone.num_layers, reads)
        hidden, device = backbone.hidden_size, backbone.head.weight.device
        self.fc = nn.Linear(3 * hidden, hidden, bias=False, device=device, dtype=torch.float32)
        self.layer = EagleLayer(backbone)
        self.layer.layer = JoinedLayer(self.layer.layer, backbone, norm_before_residual=norm_before_residual)
        self.layer.width = 2 * hidden
        self.norm = new_norm(backbone)
        for name, weight in backbone.norm.named_parameters():
            self.norm.get_parameter(name).data.copy_(whole(weight))
        self.projection = Projection(backbone.head_map(), (vocabulary.size, hidden))
        self.register_buffer("d2t", torch.empty(vocabulary.size, dtype=torch.int64, device=device))
        self.register_buffer("t2d", torch.empty(backbone.vocab_size, dtype=torch.bool, device=device))
        self.begin_with(vocabulary, backbone)

    def begin_with(self, vocabulary: ReducedVocabulary, backbone: Backbone) -> None:
        """Say these tokens, as many as before; the LM head becomes the target's over them."""
        self.d2t.copy_(vocabulary.d2t)
        self.t2d.copy_(vocabulary.t2d)
        tokens = vocabulary.tokens().to(self.d2t.device)
        self.projection.weight.data.copy_(whole(backbone.head.weight)[tokens])

    @property
    def norm_before_residual(self) -> bool:
        """See `JoinedLayer`."""
        layer = self.layer.layer
        assert isinstance(layer, JoinedLayer)
        return layer.norm_before_residual

    @property
    def vocabulary(self) -> ReducedVocabulary:
        """The tokens that it can say."""
        return ReducedVocabulary(self.d2t, self.t2d)

    def features(self, states: Sequence[Tensor]) -> Tensor:
        """The inputs of layers `reads`, each [..., hidden] -> the features [..., hidden]."""
        return self.fc(torch.cat([state.to(self.fc.weight.dtype) for state in states], dim=-1))

    def inputs(self, embedded: Tensor, features: Tensor) -> Tensor:
        """See `DraftHead.inputs`: side by side, embeddings first, [..., 2 * hidden]."""
        return torch.cat((embedded.to(features.dtype), features), dim=-1)

    def logits(self, output: Tensor) -> Tensor:
        """See `DraftHead.logits`: by its own norm and LM head, of the draft's tokens."""
        return self.projection(self.norm(output), lambda states, head: head.logits(states))
