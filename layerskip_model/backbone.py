"""One view of any transformers decoder-only model: embedding, layers, final norm, LM head.

For training the model's own forward runs and only the calls of its decoder layers are intercepted, so masks,
rotary tables, embedding multipliers and soft caps stay the model's. Nothing is renamed, no installed file is
patched, and a model that is not in training computes what it always did.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip_model.errors import UserError
from layerskip_model.head_map import HeadMap

Result = TypeVar("Result")
States = TypeVar("States", Tensor, tuple[Tensor, ...])
LayerCall = Callable[..., Tensor]
Around = Callable[..., Tensor]  # around(index, call, hidden, *args, **kwargs) -> hidden

FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
# Relative differences that are rounding; what the check is for, a scale or soft cap not known, is far beyond.
CHECK_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


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
        self.base = model.get_decoder()
        self.model_type: str = self.config.model_type
        head = model.get_output_embeddings()
        layers = getattr(self.base, "layers", None)
        norms = [getattr(self.base, name, None) for name in FINAL_NORM_NAMES]
        norm = next((norm for norm in norms if norm is not None), None)
        if not isinstance(layers, nn.ModuleList) or not len(layers) or norm is None or head is None:
            raise UserError(
                f"model type '{self.model_type}' has no decoder layers, final norm and LM head where a "
                "decoder-only language model has them; use a model such as Llama, Mistral, Qwen, Gemma, Phi-3 or OLMo"
            )
        self.layers = layers
        self.norm: nn.Module = norm
        self.head: nn.Linear = head
        self.embed: nn.Module = model.get_input_embeddings()
        self.num_layers = len(layers)
        self.hidden_size: int = self.config.hidden_size
        self.vocab_size: int = self.config.vocab_size
        self.context_length: int = self.config.max_position_embeddings
        self._interceptions: list[_Interception] = []

    def head_map(self) -> HeadMap:
        """The map from a normed hidden state to logits, with the model's scale and soft cap."""
        scale = getattr(self.config, "logit_scale", None) or 1.0  # Cohere multiplies
        scale /= getattr(self.config, "logits_scaling", None) or 1.0  # Granite divides
        softcap = getattr(self.config, "final_logit_softcapping", None)  # Gemma
        return HeadMap(self.head.weight, self.head.bias, scale=scale, softcap=softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of an exit: g in the paper, the final norm and the LM head. [..., hidden] -> [..., vocab]."""
        # By the head's own forward: its weight may be quantized, or on another device or disk until it runs.
        return self.head_map().squash(self.head(self.norm(hidden)))

    def at_head(self, hidden: States, compute: Callable[[States, HeadMap], Result]) -> Result:
        """`compute(hidden, head map)`, run inside the head module's forward; `hidden` one state or several.

        Engines that shard parameters gather the head's weight only while the head module runs, so a loss
        that reads the weight itself has to run in there.
        """
        with _forward_replaced(self.head, lambda states: compute(states, self.head_map())):
            return self.head(hidden)

    @torch.no_grad()
    def check(self) -> None:
        """Compare norm and head as they are known here with what the model does, by a forward of two tokens.

        A model whose weights are elsewhere (on the meta device, or split over ranks), or whose attention runs on a
        GPU in half precision only, is represented by a small one that is built alike. Raises UserError for a model
        whose layers return something else than hidden states, or that does more after them than is known here: early
        exits would be trained on logits that it never gives.
        """
        if not has_values(self.model) or "flash" in (self.config._attn_implementation or ""):
            Backbone(_small_twin(self.model)).check()
            return
        states: dict[str, Any] = {}

        def read_last_layer(module: nn.Module, args: Any, output: Any) -> None:
            states["last"] = output  # [1, 2, hidden]

        def enlarge(module: nn.Module, args: Any, output: Any) -> Any:
            states["final"] = output.last_hidden_state  # [1, 2, hidden]
            states["large"] = output.last_hidden_state * 100.0  # far enough for soft caps to show
            output.last_hidden_state = states["large"]
            return output

        hooks = [
            self.layers[-1].register_forward_hook(read_last_layer),
            self.base.register_forward_hook(enlarge),
        ]
        was_training = self.model.training
        try:
            tokens = torch.zeros(1, 2, dtype=torch.long, device=model_device(self.model))
            logits = self.model.eval()(input_ids=tokens, use_cache=False).logits
        finally:
            self.model.train(was_training)
            for hook in hooks:
                hook.remove()
        if not isinstance(states["last"], Tensor) or not _close(self.norm(states["last"]), states["final"]):
            raise UserError(
                f"model type '{self.model_type}' does more between its last layer and its LM head than the final "
                "norm, so it cannot exit early here; use a model such as Llama, Mistral, Qwen or Gemma"
            )
        expected = self.at_head(states["large"], lambda hidden, head: head.logits(hidden))
        if not _close(expected.to(logits.device), logits):
            raise UserError(
                f"model type '{self.model_type}' changes its logits after the LM head in a way that is not known "
                "here; use a model such as Llama, Mistral, Qwen, Gemma, Granite or Cohere"
            )

    def intercept_layers(self, around: Around) -> None:
        """Have each decoder layer's forward run as `around(index, call, ...)`, on this instance only.

        `call` is the layer as it was, and its own arguments follow. This stays until `release_layers`:
        activation checkpointing may call the layers again during backward. A deepcopy of the model takes a copy
        of the object along that `around` is a method of, and leaves this one alone.
        """
        if self._interceptions:
            raise ValueError("the layers are intercepted already: call release_layers first")
        self._interceptions = [_Interception(around, *pair) for pair in enumerate(self.layers)]
        for interception in self._interceptions:
            interception.layer.forward = interception

    def release_layers(self) -> None:
        """Give every decoder layer the forward back that it had before `intercept_layers`."""
        for interception in self._interceptions:
            interception.release()
        self._interceptions = []

    def rotary(self, like: Tensor, position_ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """cos and sin of positions [batch, seq], [batch, seq, rotary dim] each in the dtype of `like`.

        `kind` is an attention kind: some models turn each by another base.
        """
        return rotary_tables(self.base.rotary_emb, like, position_ids, kind)

    def final_states(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """The model's own forward up to and with the final norm. Tokens [batch, seq] -> [batch, seq, hidden].

        Where `position_ids` [batch, seq] restart at 0 a new document begins, which attends to itself only; the
        model makes that mask.
        """
        return self.base(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state


def rotary_tables(
    rotary_emb: nn.Module, like: Tensor, position_ids: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """See `Backbone.rotary`, of any model's module for it."""
    per_kind = "layer_type" in inspect.signature(rotary_emb.forward).parameters
    return rotary_emb(like, position_ids, *((kind,) if per_kind else ()))


class _Interception:
    """What stands in for a layer's forward. An object, as a deepcopy of a closure still calls the original."""

    def __init__(self, around: Around, index: int, layer: nn.Module) -> None:
        self.around = around
        self.index = index
        self.layer: Any = layer
        self.previous = layer.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.around(self.index, self.call, *args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's forward as it was; its class is asked now, because FSDP2 changes it after us."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def release(self) -> None:
        if self.layer.__dict__.get("forward") is not self:
            raise ValueError("release the interception that came last first")
        _restore(self.layer, "forward", self.previous)


@contextmanager
def _forward_replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for one module while this lasts; its hooks still run around it."""
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"  # accelerate's are in the forward
    previous = module.__dict__.get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        _restore(module, name, previous)


def _restore(module: Any, name: str, previous: Any) -> None:
    """An instance's own forward, or else (None) its class's."""
    if previous is None:
        delattr(module, name)
    else:
        setattr(module, name, previous)


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding, relative to the largest value. NaN is not."""
    if actual.shape != expected.shape:
        return False
    allowed = CHECK_TOLERANCE[expected.dtype] * expected.abs().max().item()
    return (actual - expected).abs().max().item() <= allowed


def has_values(model: nn.Module) -> bool:
    """Whether a forward can run as the model stands: no parameter on the meta device or split by DeepSpeed."""
    is_offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    return is_offloaded or not any(p.is_meta or hasattr(p, "ds_id") for p in model.parameters())


def _small_twin(model: PreTrainedModel) -> PreTrainedModel:
    """One random layer of the model's type, as wide as its own but for the MLP, with few tokens, on the CPU."""
    config = copy.deepcopy(model.config)
    sizes = config.get_text_config()
    sizes.update({"num_hidden_layers": 1, "vocab_size": 16, "intermediate_size": 64})
    sizes.update(dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"]))
    if getattr(sizes, "layer_types", None):
        sizes.layer_types = sizes.layer_types[-1:]
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        return type(model)(config)


def model_device(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies, or for an offloaded one where accelerate brings it when it is used."""
    owner: Any = next(module for module in model.modules() if module._parameters)
    device = next(owner.parameters(recurse=False)).device
    is_offloaded = device.type == "meta" and hasattr(owner, "_hf_hook")
    return torch.device(owner._hf_hook.execution_device) if is_offloaded else device
