"""The lean decoding view of a model: embed tokens, run its layers one by one, read logits.

There is no fork per model type: what differs between models (attention kinds, windows, rotary tables) is read from
the model, layers made of Llama's parts are fused, others are called as they are, and the whole is checked against
the model's own logits when a runner is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone, model_device
from layerskip_model.context import Context
from layerskip_model.errors import UserError
from layerskip_model.formats.huggingface import has_plain_weights
from layerskip_model.fused_layer import fast_norm
from layerskip_model.layer_runner import LayerRunner

# The largest difference from the model's own logits that is rounding, relative to the largest logit. Norms
# and softmaxes compute in float32 in a float64 model too.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
KINDS = ("full_attention", "sliding_attention")


class Forward(NamedTuple):
    """What a pass through some layers gives.

    Attributes:
        hidden: the states that leave the last of them, [batch, rows, hidden].
        logits: [batch, rows, vocab], if wanted.
        states: layer -> the states that left it, [batch, rows, hidden], for those wanted.
    """

    hidden: Tensor
    logits: Tensor | None
    states: dict[int, Tensor]


class Runner(LayerRunner):
    """Embed tokens, run any span of layers, read logits: the three steps that decoding is made of.

    Attributes:
        captures: how many passes were compiled or recorded so far.
        backbone: the model's parts; its `logits` is the one used here.

    `fuse=False` leaves the layers' weights where they are, as for a model that goes on training.
    Raises UserError for a model that cannot be run layer by layer, or whose logits then differ from its own.
    """

    captures = 0

    def __init__(self, model: PreTrainedModel, *, fuse: bool = True) -> None:
        backbone = Backbone(model)
        plain = type(backbone.head) is nn.Linear and not hasattr(backbone.head, "_hf_hook")
        super().__init__(
            backbone,
            list(backbone.layers),
            *attention_kinds(backbone.config, backbone.num_layers),
            device=model_device(backbone.embed),
            dtype=backbone.embed.weight.dtype,  # type: ignore[arg-type]
            fuse_layers=fuse and plain,
        )
        self.model = model
        self.vocab_size = backbone.vocab_size
        self.context_length = backbone.context_length
        self.model_type: str = backbone.config.model_type
        self._norm = fast_norm(self.backbone.norm)
        self._head = self.backbone.head_map()
        if self.fused is not None and not fused_layers_agree(self):
            self.fused = None
        check_against_model(self)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, rows] -> hidden states that enter layer 0, [batch, rows, hidden]."""
        return self.backbone.embed(tokens)

    def forward(
        self,
        inputs: Tensor,
        start: int,
        stop: int,
        context: Context,
        *,
        head: bool = True,
        needs: tuple[int, ...] = (),
    ) -> Forward:
        """A pass through layers start..stop-1, from tokens [batch, rows] where these begin at layer 0.

        `inputs` are hidden states [batch, rows, hidden] otherwise. `head`: whether logits are wanted. `needs`:
        layers whose outgoing states are.
        """
        hidden = inputs if inputs.is_floating_point() else self.embed(inputs)
        hidden, states = self.run_reading(hidden, start, stop, context, needs)
        return Forward(hidden, self.logits(hidden) if head else None, states)

    def logits(self, hidden: Tensor) -> Tensor:
        """The final norm and the LM head after any layer. [..., hidden] -> [..., vocab]."""
        if self.fused is None:
            return self.backbone.logits(hidden).to(self.device)  # the head may lie on another device
        return self._head.logits(self.normed(hidden))

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm alone: what the LM head reads, and drafting heads. [..., hidden] -> the same shape."""
        norm = self.backbone.norm if self.fused is None else self._norm
        return norm(hidden)


def attention_kinds(config: Any, num_layers: int) -> tuple[list[str], dict[str, int | None]]:
    """Each layer's attention kind, and the window of each kind. Raises UserError for a kind not supported."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # Mistral and Phi-3: a window on every layer
        kinds = [KINDS[0] if window is None else KINDS[1]] * num_layers
    strange = sorted(set(kinds) - set(KINDS))
    if strange:
        raise UserError(
            f"model type '{config.model_type}' has layers of type '{strange[0]}'; "
            f"only {' and '.join(KINDS)} can be decoded here"
        )
    windows = {KINDS[0]: None, KINDS[1]: window}
    return list(kinds), {kind: windows[kind] for kind in KINDS if kind in kinds}


def check_against_model(runner: Runner) -> None:
    """Compare a prefill and a chunk after it, entered in mid-stack, with the model's own logits.

    Raises UserError with the model type and the largest difference where they differ by more than rounding.
    """
    tokens = sample_tokens(runner)
    with torch.inference_mode():
        expected = runner.model(input_ids=tokens, use_cache=False).logits
        try:
            actual, _ = _in_two_chunks(runner, tokens)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"model type '{runner.model_type}' cannot be decoded layer by layer ({error}); "
                "use a model such as Llama, Mistral, Qwen, Gemma, Phi-3 or OLMo"
            ) from error
    difference, allowed = _difference(actual, expected)
    if not has_plain_weights(runner.model):  # int8 products round by the largest values of all rows together
        allowed = max(allowed, TOLERANCE[torch.bfloat16] * expected.abs().max().item())
    if not difference <= allowed:  # NaN fails too
        raise UserError(
            f"model type '{runner.model_type}' cannot be decoded here: run layer by layer, its logits are "
            f"off by {difference:.3g} (allowed {allowed:.3g}); use a Llama, Mistral, Qwen or Gemma model"
        )


def fused_layers_agree(runner: Runner) -> bool:
    """Whether what leaves each fused layer is what leaves the model's own, but for rounding."""
    tokens = sample_tokens(runner)
    expected: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: expected.append(output))
        for layer in runner.backbone.layers
    ]
    try:
        with torch.inference_mode():
            runner.model(input_ids=tokens, use_cache=False)
            _, states = _in_two_chunks(runner, tokens)
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [_difference(states[layer], output) for layer, output in enumerate(expected)]
    return all(difference <= allowed for difference, allowed in pairs)


def sample_tokens(runner: Runner) -> Tensor:
    """Some tokens to compare with, [1, 7]."""
    if runner.model.training:
        raise ValueError("the model is in training mode: call model.eval() before making a Runner")
    generator = torch.Generator().manual_seed(0)
    return torch.randint(runner.vocab_size, (1, 7), generator=generator).to(runner.device)


def _difference(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference, and what rounding may make of it, relative to the largest value."""
    allowed = TOLERANCE[expected.dtype] * expected.abs().max().item()
    return (actual - expected.to(actual.device)).abs().max().item(), allowed


def _in_two_chunks(runner: Runner, tokens: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits [1, 7, vocab], by a prefill of 4 tokens and a chunk of 3, each split in mid-stack.

    Also layer -> the states that leave it, [1, 7, hidden].
    """
    cache = _Appending()
    tables = runner.tables(7, 7)
    middle, last = (runner.num_layers + 1) // 2, runner.num_layers
    every = tuple(range(last))
    logits, states = [], []
    for begin, count in ((0, 4), (4, 3)):
        context = runner.span(cache, tables, begin, count)
        below = runner.forward(tokens[:, begin : begin + count], 0, middle, context, head=False, needs=every)
        above = runner.forward(below.hidden, middle, last, context, needs=every)
        assert above.logits is not None
        logits.append(above.logits)
        states.append(below.states | above.states)
    joined = {layer: torch.cat([chunk[layer] for chunk in states], dim=1) for layer in every}
    return torch.cat(logits, dim=1), joined


class _Appending:
    """The simplest cache: each update appends to what its layer already has."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        if layer_idx in self.layers:
            old_keys, old_values = self.layers[layer_idx]
            keys, values = torch.cat((old_keys, keys), dim=2), torch.cat((old_values, values), dim=2)
        self.layers[layer_idx] = keys, values
        return keys, values
