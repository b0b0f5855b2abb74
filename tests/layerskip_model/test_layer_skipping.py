"""Layer dropout inside a whole model against a loop over single samples."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone, LayerCall
from layerskip_model.early_exit import EarlyExitModel
from layerskip_model.layer_dropout import LayerDropout, run_kept_rows
from layerskip_model.token_loss import IGNORE_INDEX
from tests.layerskip_model.small import (
    KINDS,
    TOLERANCE,
    assert_same_gradients,
    batch,
    exit_loss,
    half_dropped,
)
from tests.tiny_models import tiny_model


def naive_dropped_loss(
    model: PreTrainedModel, keep: np.ndarray, weights: dict[int, float], inputs: Tensor, labels: Tensor
) -> Tensor:
    """J(t) times the tokens, one sample at a time: the sample's dropped layers are taken out of its model."""
    total = torch.zeros((), dtype=torch.float64)
    layers = list(model.get_decoder().layers)
    head, norm = model.get_output_embeddings(), model.get_decoder().norm
    cap = getattr(model.config, "final_logit_softcapping", None)
    for row in range(len(inputs)):
        states: dict[int, Tensor] = {}

        def through(index: int, states: dict[int, Tensor] = states, row: int = row) -> Any:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                layer = layers[index]
                if keep[index, row]:
                    hidden = type(layer).forward(layer, hidden, *args, **kwargs)
                states[index + 1] = hidden
                return hidden

            return forward

        for index, layer in enumerate(layers):
            layer.forward = through(index)
        model(input_ids=inputs[row : row + 1])
        for layer in layers:
            del layer.forward
        for exit_layer, weight in weights.items():
            logits = head(norm(states[exit_layer]))[0]
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            total = total + weight * F.cross_entropy(
                logits, labels[row], ignore_index=IGNORE_INDEX, reduction="sum"
            )
    return total


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_dropout_equals_a_loop_over_samples(kind: str, attention: str) -> None:
    if kind == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no sdpa for attention soft caps")
    model = tiny_model(kind, attention=attention)
    twin = copy.deepcopy(model)
    inputs, labels = batch()
    part, rate = exit_loss(), half_dropped()
    rows, step = [8, 1, 5, 2, 30, 4], 6
    keep = rate.kept(step, rows)
    assert (~keep).any(axis=1).all()
    assert keep.any(axis=1).all()
    terms = EarlyExitModel(model, part, rate).train()(inputs, labels, rows, step)
    expected = naive_dropped_loss(twin.train(), keep, part.at(step), inputs, labels)
    torch.testing.assert_close(terms.weighted_sum(), expected, rtol=TOLERANCE, atol=0)
    terms.weighted_sum().backward()
    expected.backward()
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_masks_and_positions_follow_their_samples(kind: str, attention: str) -> None:
    """Samples of different lengths, padded on the right (eager float64 cannot do otherwise), at their own places."""
    if kind == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no sdpa for attention soft caps")
    model = tiny_model(kind, attention=attention)
    backbone = Backbone(model)
    inputs, _ = batch()
    rate = half_dropped()
    keep = rate.kept(6, range(6))
    padding = torch.tensor([0, 3, 1, 0, 4, 2])
    place = torch.arange(9)[None]
    mask = (place < 9 - padding[:, None]).long()
    positions = place + 3 * torch.arange(6)[:, None] * torch.tensor([1, 1, 1, 1, 1, 2] + [3] * 3)  # with gaps

    def run(rows: slice) -> Tensor:
        def around(index: int, call: LayerCall, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return run_kept_rows(call, keep[index, rows], hidden, *args, **kwargs)

        backbone.intercept_layers(around)
        output = model(input_ids=inputs[rows], attention_mask=mask[rows], position_ids=positions[rows])
        backbone.release_layers()
        return output.logits

    with torch.no_grad():
        together = run(slice(0, 6))
        for row in range(6):
            alone = run(slice(row, row + 1))
            seen = mask[row].bool()
            torch.testing.assert_close(together[row, seen], alone[0, seen], rtol=0, atol=TOLERANCE)


def test_autocast_keeps_the_stream_in_float32() -> None:
    model = tiny_model(dtype=torch.float32)
    module = EarlyExitModel(model, exit_loss(), half_dropped()).train()
    inputs, labels = batch()
    expected = module(inputs, labels, range(6), 6).weighted_sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(inputs, labels, range(6), 6).weighted_sum()
    loss.backward()
    assert loss.dtype == torch.float32
    assert 0 < abs(loss.item() - expected.item()) < 0.05 * expected.item()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {
        torch.float32
    }


def rows_per_layer(model: PreTrainedModel) -> list[list[int]]:
    """For each layer the number of rows of each of its calls, filled while the model runs."""
    seen: list[list[int]] = [[] for _ in model.get_decoder().layers]
    for layer, calls in zip(model.get_decoder().layers, seen, strict=True):
        layer.mlp.register_forward_hook(lambda module, args, output, calls=calls: calls.append(len(args[0])))
        layer.self_attn.register_forward_hook(
            lambda module, args, output, calls=calls: calls.append(len(output[0]))
        )
    return seen


def test_dropped_rows_are_not_computed() -> None:
    model = tiny_model()
    rate = half_dropped(p_max=0.8, over_depth="linear")
    module = EarlyExitModel(model, exit_loss(), rate).train()
    seen = rows_per_layer(model)
    inputs, labels = batch()
    for step in range(12):
        module(inputs, labels, range(6), step)
        kept = rate.kept(step, range(6)).sum(axis=1)
        for layer in range(4):
            assert seen[layer][-2:] == [max(kept[layer], 1)] * 2
    assert min(min(calls) for calls in seen) < 3
    assert [len(calls) for calls in seen] == [24] * 4
    module.eval()
    module(inputs, labels, range(6), 0)
    assert [calls[-2:] for calls in seen] == [[6, 6]] * 4


def all_dropped(rate: LayerDropout, rows: int) -> int:
    """A step at which some layer drops every row."""
    return next(step for step in range(40) if not rate.kept(step, range(rows)).any(axis=1).all())


def test_a_layer_that_all_rows_drop_gets_zero_gradients() -> None:
    model = tiny_model()
    rate = half_dropped(p_max=0.7)
    step = all_dropped(rate, 3)
    inputs, labels = batch(rows=3, ignored=False)
    EarlyExitModel(model, exit_loss(), rate).train()(inputs, labels, range(3), step).weighted_sum().backward()
    idle = [not row.any() for row in rate.kept(step, range(3))]
    for index, layer in enumerate(model.model.layers):
        for parameter in layer.parameters():
            assert parameter.grad is not None
            assert bool((parameter.grad == 0).all()) == idle[index]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_losses_and_gradients_do_not_depend_on_the_split_into_micro_batches() -> None:
    rate = half_dropped(p_max=0.6)
    inputs, labels = batch(rows=7)
    gradients, losses = [], []
    for cuts in ([0, 7], [0, 4, 7], [0, 1, 2, 3, 4, 5, 6, 7]):
        model = tiny_model()
        module = EarlyExitModel(model, exit_loss(), rate).train()
        total = 0.0
        for begin, end in pairwise(cuts):
            loss = module(inputs[begin:end], labels[begin:end], range(begin, end), 5).weighted_sum()
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert losses == pytest.approx([losses[0]] * 3, rel=TOLERANCE)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("how", ["model", "wrapper", "reentrant"])
def test_activation_checkpointing_redraws_the_same_decisions(how: str) -> None:
    """However the recomputation comes about: inside the layer's forward, or around the layer as a whole."""
    rate = half_dropped(p_max=0.6)
    inputs, labels = batch()
    step = all_dropped(rate, 6)
    results: list[list[Tensor | None]] = []
    for checkpointing in (False, True):
        model = tiny_model()
        module = EarlyExitModel(model, exit_loss(), rate).train()
        seen = rows_per_layer(model)
        if checkpointing and how == "wrapper":
            for index, layer in enumerate(model.model.layers):
                model.model.layers[index] = checkpoint_wrapper(layer)
        elif checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
            model.enable_input_require_grads()
        loss = module(inputs, labels, range(6), step).weighted_sum()
        loss.backward()
        kept = np.maximum(rate.kept(step, range(6)).sum(axis=1), 1)
        for layer in range(4):
            assert set(seen[layer]) == {kept[layer]}
            assert len(seen[layer]) >= (3 if checkpointing else 2)  # a recomputation may stop early
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_forwards_outside_the_modules_own_are_the_models_even_between_its_steps() -> None:
    """The decisions of the last training step must not leak into a decode, a teacher pass or an evaluation."""
    model = tiny_model()
    inputs, labels = batch()
    expected = model(input_ids=inputs).logits
    module = EarlyExitModel(model, exit_loss(), half_dropped(p_max=0.9)).train()
    module(inputs, labels, range(6), 0).weighted_sum().backward()
    assert torch.equal(model(input_ids=inputs).logits, expected)  # still in training mode
    assert model(input_ids=inputs[:2]).logits.shape == (2, 9, 64)  # of another batch
    model.eval()  # the inner model alone
    assert torch.equal(model(input_ids=inputs).logits, expected)
    generated = greedy(model, inputs[:1])
    assert torch.equal(generated, greedy(tiny_model(), inputs[:1]))


def greedy(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    generate: Any = model.generate
    return generate(input_ids=prompt, max_new_tokens=5, do_sample=False)


def test_a_forward_that_fails_leaves_no_trace() -> None:
    model = tiny_model()
    inputs, labels = batch()
    module = EarlyExitModel(model, exit_loss(), half_dropped()).train()
    hook = model.model.layers[2].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module(inputs, labels, range(6), 0)
    hook.remove()
    assert torch.equal(model(input_ids=inputs).logits, tiny_model()(input_ids=inputs).logits)
    assert module._states == {}
