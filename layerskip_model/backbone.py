"""One view of any transformers decoder-only model: embedding, layers, final norm, LM head.

For training the model's own forward runs and only the calls of its decoder layers are intercepted, so masks,
rotary tables, embedding multipliers and soft caps stay the model's. Nothing is renamed, no installed file is
patched, and a model that is not in training computes what it always did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip_model.errors import UserError
from layerskip_model.token_loss import HeadMap

Result = TypeVar("Result")
LayerCall = Callable[..., Tensor]
Around = Callable[..., Tensor]  # around(call, hidden, *args, **kwargs) -> hidden

FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


class Backbone:
    """The parts of a causal language model that layer skipping and drafting heads work on.

    Attributes:
        model: the transformers model, its LM head included.
        base: the model without its LM head.
        embed: the input embedding, any multiplier included: tokens [...] -> [..., hidden].
        layers: the L decoder layers, in order.
        norm, head: the final norm and the LM head, shared by every exit.

    Raises UserError for a model that is not built like a decoder-only language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        kind = self.config.model_type
        self.base = model.get_decoder()
        head = model.get_output_embeddings()
        layers = getattr(self.base, "layers", None)
        norms = [getattr(self.base, name) for name in FINAL_NORM_NAMES if hasattr(self.base, name)]
        if not isinstance(layers, nn.ModuleList) or not norms or head is None:
            raise UserError(
                f"model type '{kind}' has no decoder layers, final norm and LM head where a decoder-only "
                "language model has them; use a model such as Llama, Mistral, Qwen, Gemma, Phi-3 or OLMo"
            )
        self.layers = layers
        self.norm: nn.Module = norms[0]
        self.head: nn.Linear = head
        self.embed: nn.Module = model.get_input_embeddings()
        self.num_layers = len(layers)
        self.hidden_size: int = self.config.hidden_size
        self.vocab_size: int = self.config.vocab_size
        self.context_length: int = self.config.max_position_embeddings

    def head_map(self) -> HeadMap:
        """The map from a normed hidden state to logits, with the model's scale and soft cap."""
        scale = getattr(self.config, "logit_scale", None) or 1.0  # Cohere multiplies
        scale /= getattr(self.config, "logits_scaling", None) or 1.0  # Granite divides
        softcap = getattr(self.config, "final_logit_softcapping", None)  # Gemma
        return HeadMap(self.head.weight, self.head.bias, scale=scale, softcap=softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of an exit: g in the paper, the final norm and the LM head. [..., hidden] -> [..., vocab]."""
        return self.head_map().logits(self.norm(hidden))

    def at_head(self, hidden: Tensor, compute: Callable[[Tensor, HeadMap], Result]) -> Result:
        """`compute(hidden, head map)`, run inside the head module's forward.

        Engines that shard parameters gather the head's weight only while the head module runs, so a loss
        that reads the weight itself has to run in there.
        """
        head: Any = self.head
        head.forward = lambda states: compute(states, self.head_map())
        try:
            return head(hidden)
        finally:
            del head.forward

    def intercept_layers(self, around: Callable[[int, LayerCall], Around]) -> None:
        """Put `around(index, call)` in place of each decoder layer's forward, on this instance only.

        It stays until `release_layers`: activation checkpointing calls the layers again during backward.
        """
        for index, layer in enumerate(self.layers):
            layer.forward = around(index, layer.forward)

    def release_layers(self) -> None:
        """Give every decoder layer its own forward back."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)

    def final_states(self, input_ids: Tensor) -> Tensor:
        """The model's own forward up to the final norm. Tokens [batch, seq] -> [batch, seq, hidden]."""
        return self.base(input_ids=input_ids, use_cache=False).last_hidden_state


def model_device(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next(model.parameters()).device
