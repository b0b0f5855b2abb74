"""Training an EAGLE head: which feature meets which token and target, the losses, the noise, the measurements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip_model import head_map
from layerskip_model.backbone import Backbone
from layerskip_model.eagle import EagleHead, unrolled
from layerskip_model.eagle_model import DraftTerms, EagleModel
from layerskip_model.token_loss import IGNORE_INDEX
from tests.layerskip_model.small import TOLERANCE
from tests.layerskip_model.tiny_eagle import packed_batch, some_head
from tests.tiny_models import tiny_model

WEIGHTS = (0.7, 0.2)
STEPS = 3
# By hand: the places of `packed_batch` with a next token's next token that counts in the same document.
COUNTED = {(0, 0), (0, 1), (0, 2), (0, 5), (0, 6), (0, 7)}
COUNTED |= {(1, 0), (1, 1), (1, 4), (1, 5), (1, 6), (1, 7)}
COUNTED |= {(2, 0), (2, 4), (2, 5), (2, 6), (2, 7)}


def some_model(kind: str = "llama", **changes: Any) -> EagleModel:
    model = tiny_model(kind, **changes)
    head = some_head("eagle", model)
    assert isinstance(head, EagleHead)
    return EagleModel(model, head, noise=0.0, steps=STEPS)


def test_pairs_and_targets_of_a_hand_made_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that says what it is given: feature t and token t + 1; wanted: feature t + 1."""
    module = some_model().train()
    given: list[tuple[Tensor, Tensor]] = []

    def record(embedded: Tensor, features: Tensor) -> Tensor:
        given.append((embedded, features))
        return features

    monkeypatch.setattr(module.head, "inputs", record)
    monkeypatch.setattr(module.head.layer, "forward", lambda inputs, positions, steps: inputs)
    tokens = torch.tensor([[11, 12, 13, 14]])
    labels = torch.tensor([[IGNORE_INDEX, 13, 14, 15]])  # 12 is of a question
    f = module.backbone.final_states(tokens)[0]
    terms = module(tokens, labels, WEIGHTS)
    ((embedded, features),) = given
    assert torch.equal(embedded[0], module.backbone.embed(torch.tensor([12, 13, 14])))
    assert torch.equal(features[0], f[:3])
    # f_0 with 12 guesses f_1, which says 13; f_1 with 13 f_2, which says 14; f_2 with 14 f_3, which says 15.
    differences = [functional.smooth_l1_loss(f[t], f[t + 1]).item() for t in (0, 1, 2)]
    assert terms.losses[0].item() == pytest.approx(sum(differences))
    assert terms.counts.tolist() == [3, 3]
    labels[0, 2] = IGNORE_INDEX  # 14 does not count: nothing is guessed about it
    without = module(tokens, labels, WEIGHTS).losses[0].item()
    assert without == pytest.approx(differences[0] + differences[2])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
def test_losses_and_gradients_are_those_of_the_naive_twin(kind: str) -> None:
    """With documents packed, and labels that do not count."""
    module = some_model(kind).train()
    tokens, labels, positions = packed_batch()
    terms = module(tokens, labels, WEIGHTS, positions)
    terms.total.backward()
    actual = {name: value.grad for name, value in module.named_parameters()}
    module.zero_grad()

    backbone, head = module.backbone, module.head
    features = backbone.final_states(tokens, positions).detach()
    inputs = head.inputs(backbone.embed(tokens)[:, 1:].detach(), features[:, :-1])
    guess = head.layer(inputs, positions[:, :-1])
    regression, entropy = [], []
    for row, t in sorted(COUNTED):
        regression.append(functional.smooth_l1_loss(guess[row, t], features[row, t + 1]))
        said = backbone.head_map().logits(features[row, t + 1]).softmax(-1)
        entropy.append(-(said * backbone.head_map().logits(guess[row, t]).log_softmax(-1)).sum())
    losses = [torch.stack(regression).sum(), torch.stack(entropy).sum()]
    expected = WEIGHTS[0] * losses[0] + WEIGHTS[1] * losses[1]
    torch.testing.assert_close(terms.total, expected, rtol=TOLERANCE, atol=0.0)
    for loss, twin in zip(terms.losses, losses, strict=True):
        assert not loss.requires_grad
        torch.testing.assert_close(loss, twin.detach(), rtol=TOLERANCE, atol=0.0)
    assert terms.counts.tolist() == [len(COUNTED)] * 2
    assert terms.measures is None
    expected.backward()
    for name, value in module.named_parameters():
        if name.startswith("model."):
            assert actual[name] is None
            assert not value.requires_grad
        else:
            torch.testing.assert_close(actual[name], value.grad, rtol=1e-4, atol=1e-6)


def test_packed_documents_train_as_they_do_alone() -> None:
    module = some_model().train()
    tokens, labels, positions = packed_batch()
    packed = module(tokens[:1], labels[:1], WEIGHTS, positions[:1])
    alone = [module(tokens[:1, part], labels[:1, part], WEIGHTS) for part in (slice(0, 5), slice(5, 9))]
    torch.testing.assert_close(packed.total, alone[0].total + alone[1].total)
    assert packed.counts.tolist() == (alone[0].counts + alone[1].counts).tolist() == [6, 6]


def test_the_model_is_frozen() -> None:
    """It has no gradients and no graph, stays in evaluation mode, and not a byte of it changes."""
    module = some_model().train()
    assert module.head.training
    assert not any(part.training for part in module.model.modules())
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    grads: list[bool] = []
    module.model.model.layers[0].register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(*packed_batch()[:2], WEIGHTS).total.backward()
    optimizer.step()
    assert grads == [False]
    trained = {name for name, value in module.named_parameters() if value.grad is not None}
    assert trained == {name for name, value in module.named_parameters() if name.startswith("head.")}
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
    assert {name.split(".")[0] for name in module.head.state_dict()} == {"fc", "layer"}


def test_noise_is_uniform_seeded_and_for_training_only() -> None:
    module = some_model().train()
    module.noise = 0.1
    tokens, labels, positions = packed_batch()
    states = module.backbone.final_states(tokens, positions)[:, :-1]
    offsets = []
    original = module.head.inputs

    def record(embedded: Tensor, features: Tensor) -> Tensor:
        offsets.append(features.detach() - states)
        return original(embedded, features)

    module.head.inputs = record  # type: ignore[method-assign]
    for seeds in ((1, 7, 3), (1, 9, 4), (2, 7, 3)):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        module(tokens, labels, WEIGHTS, positions, generators=generators)
    for first, second, equal in ((0, 1, (0,)), (0, 2, (1, 2))):
        rows = zip(offsets[first], offsets[second], strict=True)
        assert tuple(row for row, (left, right) in enumerate(rows) if torch.equal(left, right)) == equal
    assert 0.099 < offsets[0].abs().max() <= 0.1
    assert offsets[0].mean().abs() < 0.01
    assert offsets[0].std().item() == pytest.approx(0.2 / 12**0.5, rel=0.05)
    module.eval()(tokens, labels, WEIGHTS, positions)
    assert not offsets[3].any()


def test_features_that_are_known_are_not_computed() -> None:
    module = some_model().train()
    tokens, labels, positions = packed_batch()
    features = module.backbone.final_states(tokens, positions).detach()
    online = module(tokens, labels, WEIGHTS, positions)
    module.model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    cached = module(tokens, labels, WEIGHTS, positions, features=features)
    assert torch.equal(online.total, cached.total)


def test_measurements_are_those_of_the_naive_twin() -> None:
    """Each step on what the head made in the one before: first choices beside the model's own."""
    module = some_model().eval()
    module.model.lm_head.weight.data[3:] *= 0.01  # three likely tokens: agreement comes and goes
    tokens, labels, positions = packed_batch()
    found = module(tokens, labels, WEIGHTS, positions)
    assert isinstance(found, DraftTerms)
    measures = found.measures
    assert measures is not None
    backbone, head = module.backbone, module.head
    features = backbone.final_states(tokens, positions)
    own = backbone.head_map().logits(features).argmax(-1)
    embedded = backbone.embed(tokens)[:, 1:]
    outputs = list(unrolled(head, embedded, features[:, :-1], positions[:, :-1], STEPS))
    drafted = [head.logits(output).argmax(-1) for output in outputs]

    def counts(row: int, t: int, step: int) -> bool:
        there = t + step + 1
        if there >= 9 or labels[row, there] == IGNORE_INDEX:
            return False
        return int(positions[row, there] - positions[row, t]) == step + 1

    every = [(row, t) for row in range(3) for t in range(8)]
    for step in range(STEPS):
        judged = [(row, t) for row, t in every if counts(row, t, step)]
        agreed = sum(int(drafted[step][row, t] == own[row, t + step + 1]) for row, t in judged)
        right = sum(int(drafted[step][row, t] == labels[row, t + step + 1]) for row, t in judged)
        assert (measures.counts[step + 1], measures.agreement[step + 1]) == (len(judged), agreed)
        assert measures.top1[step + 1] == right
    whole = [place for place in every if all(counts(*place, step) for step in range(STEPS))]
    accepted = 0
    for row, t in whole:
        accepted += 1
        for step in range(STEPS):
            if drafted[step][row, t] != own[row, t + step + 1]:
                break
            accepted += 1
    assert (measures.places, measures.accepted) == (len(whole), accepted)
    assert len(whole) < accepted < len(whole) * (STEPS + 1)
    assert found.counts.tolist() == [len(COUNTED)] * 2
    torch.testing.assert_close(found.losses, module.train()(tokens, labels, WEIGHTS, positions).losses)


def test_what_counts_nothing_is_no_nan() -> None:
    """A batch without any label: zero, with gradients for DDP."""
    module = some_model().train()
    tokens = packed_batch()[0]
    terms = module(tokens, torch.full_like(tokens, IGNORE_INDEX), WEIGHTS)
    terms.total.backward()
    assert terms.total.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in module.head.parameters())


def test_logits_of_all_tokens_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                largest = max(largest, made.numel())
            return made

    monkeypatch.setattr(head_map, "CPU_CHUNK_BYTES", 4 * 512 * 16)  # 16 rows of logits
    module = some_model(hidden_size=8, head_dim=2, intermediate_size=16, vocab_size=512)
    tokens = torch.randint(512, (8, 65))
    for mode in (True, False):
        with Watch():
            terms = module.train(mode)(tokens[:, :-1], tokens[:, 1:], WEIGHTS)
            terms.total.backward()
    assert largest < 8 * 64 * 512 / 8


def test_a_new_head_has_weights_of_its_own() -> None:
    """float32 whatever the model's dtype is, as many as the paper says: fc and a layer without its input norm."""
    backbone = Backbone(tiny_model("llama", dtype=torch.bfloat16))
    head = EagleHead(backbone, bias=False)
    assert {value.dtype for value in head.parameters()} == {torch.float32}
    layer = sum(value.numel() for value in backbone.layers[0].parameters())
    assert sum(value.numel() for value in head.parameters()) == 2 * 32 * 32 + layer - 32
    hidden = torch.randn(1, 3, 32, dtype=torch.bfloat16)
    output = head.layer(head.inputs(hidden, hidden))
    assert (output.dtype, output.shape) == (torch.float32, (1, 3, 32))
    assert head.logits(output).shape == (1, 3, 64)
