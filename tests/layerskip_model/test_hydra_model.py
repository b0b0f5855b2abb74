"""A frozen model with Hydra heads against naive twins: losses, gradients, measurements, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from layerskip_model import head_map
from layerskip_model.backbone import Backbone
from layerskip_model.head_terms import HeadMeasures, HeadTerms
from layerskip_model.hydra import HydraHeads
from layerskip_model.hydra_model import HydraModel
from layerskip_model.token_loss import IGNORE_INDEX
from tests.layerskip_model.small import TOLERANCE
from tests.layerskip_model.test_hydra import HEADS, naive_logits, new_heads
from tests.layerskip_model.test_medusa import batch, naive_label
from tests.tiny_models import tiny_model

WEIGHTS = (1.0, 0.8, 0.64, 0.5)
LOSSES: Any = ("teacher", "labels")


def new_module(
    model: PreTrainedModel, loss: Any = "teacher", *, moved: bool = True, **changes: Any
) -> HydraModel:
    return HydraModel(model, new_heads(model, moved=moved, **changes), loss=loss)


def read_by_heads(heads: HydraHeads, hidden: Tensor, positions: Tensor) -> Tensor:
    """Through the prefix, a document at a time."""
    if heads.prefix is None:
        return hidden
    assert heads.prefix_norm is not None
    parts = []
    for row, where in zip(hidden, positions, strict=True):
        starts = [t for t, position in enumerate(where.tolist()) if t == 0 or position == 0]
        documents = row.tensor_split(starts[1:])
        parts.append(torch.cat([heads.prefix(document[None])[0] for document in documents]))
    return heads.prefix_norm(torch.stack(parts))


def naive_terms(
    module: HydraModel, tokens: Tensor, labels: Tensor, positions: Tensor, what: str
) -> tuple[list[Tensor], list[int]]:
    """Each head's loss and count, a place at a time."""
    backbone = module.backbone
    with torch.no_grad():
        hidden, embedded = backbone.final_states(tokens, positions), backbone.embed(tokens)
        teacher = backbone.head_map().logits(hidden).log_softmax(-1)
    read = read_by_heads(module.heads, hidden, positions)
    losses, counts = [], []
    for k in range(1, HEADS + 1):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in range(tokens.shape[0]):
            for t in range(tokens.shape[1]):
                label = naive_label(labels, positions, row, t, k)
                if label == IGNORE_INDEX:
                    continue
                path = [embedded[row, t + j] for j in range(1, k + 1)]
                log_p = naive_logits(module.heads, k - 1, read[row, t], path, module.model).log_softmax(-1)
                if what == "teacher":
                    log_q = teacher[row, t + k]
                    total = total + (log_q.exp() * (log_q - log_p)).sum()
                else:
                    total = total - log_p[label]
                count += 1
        losses.append(total)
        counts.append(count)
    return losses, counts


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("changes", [{"prefix_attention": True}, {"shared": True}], ids=["prefix", "shared"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_of_the_naive_twin(
    kind: str, changes: dict[str, Any], loss: str
) -> None:
    """Documents apart, in the prefix and in the tokens that are read; the teacher stands where the label does."""
    module = new_module(tiny_model(kind), loss, **changes).train()
    tokens, labels, positions = batch()
    terms = module(tokens, labels, WEIGHTS, positions)
    assert isinstance(terms, HeadTerms)
    terms.total.backward()
    actual = {name: value.grad for name, value in module.named_parameters()}
    module.zero_grad()

    losses, counts = naive_terms(module, tokens, labels, positions, loss)
    expected = torch.stack([w * own for w, own in zip(WEIGHTS[1:], losses, strict=True)]).sum()
    torch.testing.assert_close(terms.total, expected, rtol=TOLERANCE, atol=0.0)
    assert terms.losses[0] is None
    for own, twin in zip(terms.losses[1:], losses, strict=True):
        assert own is not None
        assert not own.requires_grad
        torch.testing.assert_close(own, twin.detach(), rtol=TOLERANCE, atol=0.0)
    assert terms.counts[1:].tolist() == counts
    assert min(counts) > 0
    expected.backward()
    for name, value in module.named_parameters():
        if name.startswith("model."):
            assert actual[name] is None
            assert not value.requires_grad
        else:
            torch.testing.assert_close(actual[name], value.grad, rtol=1e-4, atol=1e-5)


def test_states_that_are_known_are_not_computed_again() -> None:
    module = new_module(tiny_model(), prefix_attention=True).train()
    tokens, labels, positions = batch()
    expected = module(tokens, labels, WEIGHTS, positions).total
    features = module.backbone.final_states(tokens, positions)
    module.backbone.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    assert torch.equal(module(tokens, labels, WEIGHTS, positions, features=features).total, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_counts_nothing_costs_nothing_and_is_no_nan(loss: str) -> None:
    """A batch without any label: the loss is zero, and so are the gradients, which are there for DDP."""
    module = new_module(tiny_model(), loss, prefix_attention=True).train()
    tokens = batch()[0]
    terms = module(tokens, torch.full_like(tokens, IGNORE_INDEX), WEIGHTS)
    terms.total.backward()
    assert terms.total.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in module.heads.parameters())


def test_the_lm_head_is_used_for_a_teacher_only() -> None:
    """The model is in evaluation mode, and makes no graph."""
    model = tiny_model()
    used: list[bool] = []
    grads: list[bool] = []
    model.lm_head.register_forward_pre_hook(lambda *_: used.append(True))
    model.model.layers[0].register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    for loss, uses in (("labels", 0), ("teacher", 1)):
        module = new_module(model, loss, prefix_attention=True).train()
        assert not any(part.training for part in model.modules())
        assert module.heads.training
        used.clear()
        grads.clear()
        module(*batch()[:2], WEIGHTS)
        assert grads == [False]
        assert len(used) == uses


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_all_heads_logits_are_never_held_at_once(
    loss: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor has heads x tokens x vocabulary numbers, nor tokens x vocabulary; the teacher's neither."""
    from torch.utils._python_dispatch import TorchDispatchMode

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
    module = new_module(model, loss, shared=shared, prefix_attention=True)
    tokens = torch.randint(512, (8, 65))
    for mode in (True, False):
        with Watch():
            found = module.train(mode)(tokens[:, :-1], tokens[:, 1:], WEIGHTS)
            if isinstance(found, HeadTerms):
                found.total.backward()
    assert largest < 8 * 64 * 512 / 4


def test_measurements_are_those_of_the_naive_twin() -> None:
    """Each head judged on the text before its own token; the chain by the model's own choices."""
    model = tiny_model()
    module = new_module(model, prefix_attention=True).eval()
    for name, weight in module.named_parameters():
        if name.endswith("lm_head.weight") or ".projections." in name:
            weight.data[2:] *= 0.01  # two likely tokens: heads agree now and then, also after they did not
    tokens, labels, positions = batch(rows=3)
    found = module(tokens, labels, WEIGHTS, positions)
    assert isinstance(found, HeadMeasures)
    assert found.divergences is not None
    backbone = module.backbone
    with torch.no_grad():
        hidden, embedded = backbone.final_states(tokens, positions), backbone.embed(tokens)
        read = read_by_heads(module.heads, hidden, positions)
        own = backbone.head_map().logits(hidden).argmax(-1)
        divergences, _ = naive_terms(module, tokens, labels, positions, "teacher")
        losses, counts = naive_terms(module, tokens, labels, positions, "labels")
    torch.testing.assert_close(torch.stack(found.divergences), torch.stack(divergences), rtol=1e-4, atol=0.0)
    expected = torch.stack(losses).float()
    torch.testing.assert_close(torch.stack(found.losses[1:]), expected, rtol=1e-4, atol=0.0)
    assert found.counts[1:].tolist() == counts
    agreed: dict[tuple[int, int], dict[int, bool]] = {}
    for k in range(1, HEADS + 1):
        top1 = top5 = 0
        for row in range(3):
            for t in range(11):
                label = naive_label(labels, positions, row, t, k)
                if label == IGNORE_INDEX:
                    continue
                path = [embedded[row, t + j] for j in range(1, k + 1)]
                logits = naive_logits(module.heads, k - 1, read[row, t], path, model)
                top1 += int(logits.argmax() == label)
                top5 += int(label in logits.topk(5).indices)
                agreed.setdefault((row, t), {})[k] = bool(logits.argmax() == own[row, t + k])
        assert (found.top1[k], found.top5[k]) == (top1, top5)
    whole = [list(chain.values()) for chain in agreed.values() if len(chain) == HEADS]
    assert found.places == len(whole)
    assert found.accepted == sum(1 + [*chain, False].index(False) for chain in whole)
    assert [int(count) for count in found.agreement[1:]] == [
        sum(chain.get(k, False) for chain in agreed.values()) for k in range(1, HEADS + 1)
    ]
    assert found.accepted - found.places < sum(found.agreement[1:])


def test_a_teacher_that_the_heads_equal_leaves_nothing_to_learn() -> None:
    """On a model that says the same everywhere new heads say that, too: no divergence, no gradient."""
    model = tiny_model()
    model.lm_head.weight.data.zero_()
    terms = new_module(model, moved=False, prefix_attention=True).train()(*batch()[:2], WEIGHTS)
    terms.total.backward()
    assert terms.total.item() == pytest.approx(0.0, abs=1e-9)


def test_heads_learn_what_tokens_tell() -> None:
    """A model whose next token is a function of the last: Hydra can learn what no Medusa head could."""
    torch.manual_seed(0)
    model = tiny_model(dtype=torch.float32)
    heads = HydraHeads.new(Backbone(model), heads=2, layers=1, prefix_attention=False)
    module = HydraModel(model, heads, loss="labels").train()
    after = torch.randperm(64)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.02)

    def texts() -> Tensor:
        """Every second token is random, and the one after it follows from it."""
        first = torch.randint(64, (32, 6))
        return torch.stack((first, after[first]), dim=-1).flatten(1)

    for _ in range(60):
        tokens = texts()
        labels = tokens[:, 1:].clone()
        labels[:, 1::2] = IGNORE_INDEX  # what nobody can know
        module(tokens[:, :-1], labels, (1.0, 1.0, 1.0)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = texts()
    labels = tokens[:, 1:].clone()
    labels[:, 1::2] = IGNORE_INDEX
    found = module.eval()(tokens[:, :-1], labels, (1.0, 1.0, 1.0))
    assert found.top1[1] / found.counts[1] > 0.9


def test_the_cross_entropy_is_torchs() -> None:
    """Of one head over a whole batch without gaps, by torch's own function."""
    module = new_module(tiny_model(), "labels").train()
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    text, labels = tokens[:, :-1], tokens[:, 1:]
    hidden, embedded = module.backbone.final_states(text), module.backbone.embed(text)
    logits = module.heads.logits(0, hidden[:, :-1], embedded[:, 1:, None])
    expected = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    actual = module(text, labels, WEIGHTS).losses[1]
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=0.0)
