"""Medusa heads against naive twins: labels, losses, gradients, measurements, and what they begin as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from layerskip_model.backbone import Backbone
from layerskip_model.head_terms import HeadMeasures, HeadTerms
from layerskip_model.lora import add_lora
from layerskip_model.medusa import MedusaHeads, labels_ahead
from layerskip_model.medusa_model import MedusaModel
from layerskip_model.token_loss import IGNORE_INDEX
from tests.layerskip_model.small import TOLERANCE
from tests.tiny_models import tiny_model

WEIGHTS = (1.0, 0.8, 0.64, 0.5)
HEADS = 3


def new_heads(
    model: PreTrainedModel, *, layers: int = 2, shared: bool = False, moved: bool = True
) -> MedusaHeads:
    """Three heads in float64; `moved`: no longer as they begin, each in its own way."""
    heads = MedusaHeads.new(Backbone(model), heads=HEADS, layers=layers, shared=shared).double()
    if moved:
        generator = torch.Generator().manual_seed(3)
        for parameter in heads.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return heads


def batch(rows: int = 3, length: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels with gaps and a row without any, positions that restart within rows."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(64, (rows, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, 2:5] = IGNORE_INDEX
    labels[2] = IGNORE_INDEX
    positions = torch.arange(length).repeat(rows, 1)
    positions[0, 7:] -= 7
    labels[0, 6] = IGNORE_INDEX
    positions[1, 1:] -= 1
    labels[1, 0] = IGNORE_INDEX
    return tokens[:, :-1], labels, positions


def naive_label(labels: Tensor, positions: Tensor, row: int, t: int, k: int) -> int:
    """The token k + 1 places after the one at t, if the text goes on for so long."""
    for place in range(t + 1, t + k + 1):
        if place >= labels.shape[1] or positions[row, place] == 0:
            return IGNORE_INDEX
    return int(labels[row, t + k])


def naive_logits(heads: MedusaHeads, index: int, hidden: Tensor, model: PreTrainedModel) -> Tensor:
    """The paper's p_k, written out, with the model's own soft cap."""
    weights = dict(heads.named_parameters())
    for block in range(heads.layers):
        name = f"blocks.{index}.{block}.linear"
        hidden = hidden + functional.silu(hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
    logits = hidden @ weights[f"projections.{0 if heads.shared else index}.weight"].T
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def test_the_label_of_head_k_is_the_token_k_plus_one_places_on() -> None:
    _, labels, positions = batch()
    for given in (positions, None):
        ahead = labels_ahead(labels, HEADS, given)
        whole = torch.arange(11).repeat(3, 1) if given is None else positions
        expected = [
            [[naive_label(labels, whole, row, t, k) for t in range(11)] for row in range(3)]
            for k in range(HEADS + 1)
        ]
        assert ahead.tolist() == expected
    tokens = torch.arange(10, 18)[None]
    assert labels_ahead(tokens[:, 1:], 2)[:, 0].tolist() == [
        [11, 12, 13, 14, 15, 16, 17],
        [12, 13, 14, 15, 16, 17, IGNORE_INDEX],
        [13, 14, 15, 16, 17, IGNORE_INDEX, IGNORE_INDEX],
    ]


def test_heads_beyond_the_row_have_no_labels() -> None:
    counts = (labels_ahead(torch.ones(2, 3, dtype=torch.long), 5) != IGNORE_INDEX).flatten(1).sum(1)
    assert counts.tolist() == [6, 4, 2, 0, 0, 0]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("shared", [False, True])
def test_every_head_begins_as_the_lm_head(kind: str, shared: bool) -> None:
    """And reads the final normed state; a tied LM head is copied, not shared."""
    model = tiny_model(kind, tie_word_embeddings=True)
    heads = new_heads(model, shared=shared, moved=False)
    tokens = batch()[0]
    hidden = Backbone(model).final_states(tokens)
    for index in range(HEADS):
        torch.testing.assert_close(heads.logits(index, hidden), model(tokens).logits, rtol=1e-5, atol=1e-5)
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in heads.parameters()}
    assert len(heads.projections) == (1 if shared else HEADS)


def test_every_block_has_its_own_weights() -> None:
    """[block] * n would be one block n times over, a known defect of public trainers."""
    heads = MedusaHeads.new(Backbone(tiny_model()), heads=HEADS, layers=2, shared=False)
    addresses = [parameter.data_ptr() for parameter in heads.parameters()]
    assert len(set(addresses)) == len(addresses) == HEADS * (2 * 2 + 1)
    blocks = [parameter for name, parameter in heads.named_parameters() if name.startswith("blocks")]
    assert all(parameter.dtype == torch.float32 and not parameter.any() for parameter in blocks)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_losses_and_gradients_are_those_of_the_naive_twin(kind: str, shared: bool, frozen: bool) -> None:
    model = tiny_model(kind)
    module = MedusaModel(model, new_heads(model, shared=shared), frozen=frozen).train()
    tokens, labels, positions = batch()
    terms = module(tokens, labels, WEIGHTS, positions)
    assert isinstance(terms, HeadTerms)
    terms.total.backward()
    actual = {name: value.grad for name, value in module.named_parameters()}
    module.zero_grad()

    hidden = module.backbone.final_states(tokens, positions)
    hidden = hidden.detach() if frozen else hidden
    ahead = labels_ahead(labels, HEADS, positions)
    every = [module.backbone.head_map().logits(hidden)]
    every += [naive_logits(module.heads, index, hidden, model) for index in range(HEADS)]
    losses = [
        functional.cross_entropy(
            logits.flatten(0, 1), own.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        for logits, own in zip(every, ahead, strict=True)
    ]
    first = 1 if frozen else 0
    weighted = [w * loss for w, loss in zip(WEIGHTS[first:], losses[first:], strict=True)]
    expected = torch.stack(weighted).sum()
    torch.testing.assert_close(terms.total, expected, rtol=TOLERANCE, atol=0.0)
    assert (terms.losses[0] is None) == frozen
    for loss, twin in zip(terms.losses[first:], losses[first:], strict=True):
        assert loss is not None
        assert not loss.requires_grad
        torch.testing.assert_close(loss, twin, rtol=TOLERANCE, atol=0.0)
    assert terms.counts.tolist() == (ahead != IGNORE_INDEX).flatten(1).sum(1).tolist()
    expected.backward()
    for name, value in module.named_parameters():
        if frozen and name.startswith("model."):
            assert actual[name] is None
            assert not value.requires_grad
        else:
            torch.testing.assert_close(actual[name], value.grad, rtol=1e-4, atol=1e-5)


def test_what_counts_nothing_costs_nothing_and_is_no_nan() -> None:
    """A batch without any label: the loss is zero, and so are the gradients, which are there for DDP."""
    model = tiny_model()
    module = MedusaModel(model, new_heads(model), frozen=True).train()
    tokens = batch()[0]
    terms = module(tokens, torch.full_like(tokens, IGNORE_INDEX), WEIGHTS)
    assert isinstance(terms, HeadTerms)
    terms.total.backward()
    assert terms.total.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in module.heads.parameters())


def test_a_frozen_model_makes_no_logits_and_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training: neither the LM head nor a gradient of the model; and it is in evaluation mode."""
    model = tiny_model()
    module = MedusaModel(model, new_heads(model), frozen=True).train()
    assert not any(part.training for part in model.modules())
    assert module.heads.training
    grads: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))

    def used(*_: Any) -> None:
        raise AssertionError("the LM head was used")

    handle = model.lm_head.register_forward_pre_hook(used)
    module(*batch()[:2], WEIGHTS)
    assert grads == [False]
    handle.remove()
    assert isinstance(module.eval()(*batch()[:2], WEIGHTS), HeadMeasures)


def test_all_heads_logits_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor has heads x tokens x vocabulary numbers, nor tokens x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from layerskip_model import head_map

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                largest = max(largest, made.numel())
            return made

    model = tiny_model(hidden_size=8, head_dim=2, vocab_size=512)
    monkeypatch.setattr(head_map, "CPU_CHUNK_BYTES", 4 * 512 * 16)  # 16 rows of logits
    for shared in (False, True):
        module = MedusaModel(model, new_heads(model, shared=shared), frozen=True).train()
        tokens = torch.randint(512, (8, 65))
        for mode in (True, False):
            with Watch():
                found = module.train(mode)(tokens[:, :-1], tokens[:, 1:], WEIGHTS)
                if isinstance(found, HeadTerms):
                    found.total.backward()
    assert largest < 8 * 64 * 512 / 8


def test_measurements_are_those_of_the_naive_twin() -> None:
    model = tiny_model()
    module = MedusaModel(model, new_heads(model), frozen=True).eval()
    for name, weight in module.named_parameters():
        if name.endswith("lm_head.weight") or ".projections." in name:
            weight.data[2:] *= 0.01  # two likely tokens: heads agree now and then, also after they did not
    tokens, labels, positions = batch(rows=3)
    found = module(tokens, labels, WEIGHTS, positions)
    assert isinstance(found, HeadMeasures)
    hidden = module.backbone.final_states(tokens, positions)
    logits = [module.backbone.head_map().logits(hidden)]
    logits += [naive_logits(module.heads, index, hidden, model) for index in range(HEADS)]
    first = [each.argmax(-1) for each in logits]
    five = [each.topk(5).indices for each in logits]
    accepted = places = 0
    for k in range(HEADS + 1):
        top1 = top5 = agreement = count = 0
        loss = 0.0
        for row in range(3):
            for t in range(11):
                label = naive_label(labels, positions, row, t, k)
                if label == IGNORE_INDEX:
                    continue
                count += 1
                top1 += int(first[k][row, t] == label)
                top5 += int(label in five[k][row, t])
                agreement += int(first[k][row, t] == first[0][row, t + k])
                loss -= logits[k][row, t].log_softmax(-1)[label].item()
        assert found.counts[k] == count > 0
        assert (found.top1[k], found.top5[k]) == (top1, top5)
        assert k == 0 or found.agreement[k] == agreement
        assert found.losses[k].item() == pytest.approx(loss, rel=1e-4)
    for row in range(3):
        for t in range(11):
            if all(naive_label(labels, positions, row, t, k) != IGNORE_INDEX for k in range(1, HEADS + 1)):
                places, accepted = places + 1, accepted + 1
                for k in range(1, HEADS + 1):
                    if first[k][row, t] != first[0][row, t + k]:
                        break
                    accepted += 1
    assert (found.places, found.accepted) == (places, accepted)
    assert accepted - places < sum(found.agreement[1:])  # some agreements come after a difference


def test_heads_that_see_ahead_accept_everything() -> None:
    """On a model that says one token only every head agrees, whatever the text."""
    model = tiny_model()
    model.lm_head.weight.data.zero_()
    module = MedusaModel(model, new_heads(model, moved=False), frozen=True).eval()
    found = module(*batch()[:2], WEIGHTS)
    assert isinstance(found, HeadMeasures)
    assert found.accepted == found.places * (HEADS + 1) > 0


def test_self_distillation_is_kl_against_the_model_without_its_adapters() -> None:
    model = tiny_model()
    tokens, labels, positions = batch()
    teacher = model(tokens, position_ids=positions, use_cache=False).logits.detach()
    add_lora(model, rank=2, alpha=4.0, dropout=0.0, targets="all-linear")
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=generator)
    model = model.double()
    module = MedusaModel(model, new_heads(model), frozen=False).train()
    terms = module(tokens, labels, WEIGHTS, positions, distil=True)
    assert isinstance(terms, HeadTerms)
    student = model(tokens, position_ids=positions, use_cache=False).logits
    divergence = functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    expected = divergence[labels != IGNORE_INDEX].sum()
    assert terms.losses[0] is not None
    torch.testing.assert_close(terms.losses[0], expected.detach(), rtol=1e-4, atol=1e-6)
    assert expected > 0.1
    terms.total.backward()
    trained = {name for name, value in module.named_parameters() if value.grad is not None}
    assert trained == {name for name, value in module.named_parameters() if value.requires_grad}
    assert all(name.startswith("heads.") or "lora_" in name for name in trained)
    assert model.training
