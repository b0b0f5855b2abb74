"""The early-exit loss of a whole model against full logits, one token at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import PreTrainedModel

from layerskip_model.early_exit import EarlyExitModel
from layerskip_model.errors import UserError
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


def naive_loss(
    model: PreTrainedModel, weights: dict[int, float], inputs: Tensor, labels: Tensor
) -> tuple[Tensor, dict[int, Tensor]]:
    """J(t) times the tokens, from the full logits of the model's own hidden states; and each exit's part."""
    states = model(input_ids=inputs, output_hidden_states=True).hidden_states  # x_0 .. x_{L-1}, norm(x_L)
    last = len(states) - 1
    scale = getattr(model.config, "logits_scaling", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    parts = {}
    for exit_layer in weights:
        hidden = states[exit_layer]
        if exit_layer < last:
            hidden = model.get_decoder().norm(hidden)
        logits = model.get_output_embeddings()(hidden) / scale
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        total = torch.zeros((), dtype=logits.dtype)
        for row in range(len(inputs)):
            for place in range(inputs.shape[1]):
                if labels[row, place] != IGNORE_INDEX:
                    total = total - F.log_softmax(logits[row, place], -1)[labels[row, place]]
        parts[exit_layer] = total
    return torch.stack([weights[e] * part for e, part in parts.items()]).sum(), parts


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_full_logits(kind: str) -> None:
    model = tiny_model(kind)
    twin = copy.deepcopy(model)
    inputs, labels = batch(rows=3)
    part = exit_loss(curriculum="rotational", every=2)
    for step in (0, 1):
        model.zero_grad()
        twin.zero_grad()
        module = EarlyExitModel(model, part, None).train()
        terms = module(inputs, labels, [0, 1, 2], step)
        loss, parts = naive_loss(twin.train(), part.at(step), inputs, labels)
        assert terms.weights == part.at(step)
        assert terms.cross_entropy.keys() == parts.keys()
        for exit_layer, expected in parts.items():
            torch.testing.assert_close(
                terms.cross_entropy[exit_layer], expected, rtol=TOLERANCE, atol=0, check_dtype=False
            )
        torch.testing.assert_close(terms.weighted_sum(), loss, rtol=TOLERANCE, atol=0)
        terms.weighted_sum().backward()
        loss.backward()
        assert_same_gradients(model, twin)
        module.backbone.release_layers()


def test_the_exit_of_layer_zero_is_not_computed_where_its_weight_is_zero() -> None:
    module = EarlyExitModel(tiny_model(), exit_loss(), None).train()
    inputs, labels = batch()
    normed = []
    module.backbone.norm.register_forward_hook(lambda *args: normed.append(1))
    assert sorted(module(inputs, labels, range(6), 0).cross_entropy) == [2, 3, 4]
    assert len(normed) == 3  # exits 2 and 3, and the model's own


def test_nothing_counts_where_all_labels_are_ignored() -> None:
    model = tiny_model()
    module = EarlyExitModel(model, exit_loss(), half_dropped()).train()
    inputs, labels = batch()
    terms = module(inputs, torch.full_like(labels, IGNORE_INDEX), range(6), 0)
    assert terms.weighted_sum().item() == 0.0
    terms.weighted_sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("kind", "attention"),  # transformers has no sdpa for Gemma-2's attention soft caps
    [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("mistral", "eager"), ("gemma2", "eager")],
)
def test_documents_of_a_row_do_not_see_each_other(kind: str, attention: str) -> None:
    """With layer dropout, and sliding windows: a row of two documents is the two documents in rows of their own."""
    model = tiny_model(kind, attention=attention)
    module = EarlyExitModel(model, exit_loss(), half_dropped()).train()
    inputs, labels = batch(rows=6, length=14, ignored=False)
    cuts = [5, 14, 7, 1, 9, 6]
    positions = torch.stack([torch.cat([torch.arange(cut), torch.arange(14 - cut)]) for cut in cuts])
    together = module(inputs, labels, range(6), 6, position_ids=positions)
    together.weighted_sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row, cut in enumerate(cuts):
        for part in (slice(0, cut), slice(cut, 14)):
            if part.start < 14:
                loss = module(
                    inputs[row : row + 1, part], labels[row : row + 1, part], [row], 6
                ).weighted_sum()
                loss.backward()
                total += loss.detach()
    torch.testing.assert_close(together.weighted_sum().detach(), total, rtol=TOLERANCE, atol=0)
    alone = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(gradients, alone, rtol=TOLERANCE, atol=TOLERANCE)


def test_norms_of_early_exits_keep_only_their_inputs_for_the_backward_pass() -> None:
    """A norm by itself saves several times its input, for each exit."""
    model = tiny_model(dtype=torch.float32)
    inputs, labels = batch(ignored=False)

    def saved(exits: list[int]) -> int:
        numel = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal numel
            numel += tensor.numel()
            return tensor

        module = EarlyExitModel(model, exit_loss(exits=exits, weights="uniform"), None).train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(inputs, labels, range(6), 0)
        module.backbone.release_layers()
        return numel

    assert saved([1, 2, 3]) - saved([]) == 3 * inputs.numel() * model.config.hidden_size


def test_evaluation_measures_every_exit_without_dropping() -> None:
    model = tiny_model()
    module = EarlyExitModel(model, exit_loss(exits=[2]), half_dropped(p_max=0.9)).eval()
    inputs, labels = batch()
    with torch.no_grad():
        terms = module(inputs, labels, range(6), 0)
        _, parts = naive_loss(model, dict.fromkeys((1, 2, 3, 4), 1.0), inputs, labels)
        states = model(input_ids=inputs, output_hidden_states=True).hidden_states
        normed = [model.model.norm(state) for state in states[1:-1]] + [states[-1]]
        first = [model.lm_head(state).argmax(-1) for state in normed]
    counted = labels != IGNORE_INDEX
    assert terms.weights == {}
    assert terms.tokens == counted.sum()
    for exit_layer in (1, 2, 3, 4):
        top = first[exit_layer - 1]
        assert terms.cross_entropy[exit_layer].item() == pytest.approx(parts[exit_layer].item(), rel=1e-5)
        assert terms.correct[exit_layer] == ((top == labels) & counted).sum()
        assert terms.agreement[exit_layer] == ((top == first[-1]) & counted).sum()


def test_deepcopied_modules_are_independent_and_alike() -> None:
    model = tiny_model()
    module = EarlyExitModel(model, exit_loss(), half_dropped()).train()
    inputs, labels = batch()
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    expected = module(inputs, labels, range(6), 1).weighted_sum()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    changed = module(inputs, labels, range(6), 1).weighted_sum()
    actual = other(inputs, labels, range(6), 1).weighted_sum()
    assert actual.item() == changed.item() != expected.item()


def test_what_cannot_be_right_is_refused() -> None:
    with pytest.raises(UserError, match="flex_attention") as caught:
        EarlyExitModel(
            tiny_model(attention="flex_attention", dtype=torch.float32), exit_loss(), half_dropped()
        )
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="4 layers"):
        EarlyExitModel(tiny_model(), exit_loss(num_layers=5), None)
    with pytest.raises(ValueError, match="4 layers"):
        EarlyExitModel(tiny_model(), exit_loss(), half_dropped(num_layers=3))
