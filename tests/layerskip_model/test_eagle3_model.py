"""Training an EAGLE-3 head: which layers it reads, each step's targets over its vocabulary, memory, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip_model import head_map
from layerskip_model.backbone import Backbone
from layerskip_model.eagle import unrolled
from layerskip_model.eagle3 import Eagle3Head, JoinedLayer, feature_layers
from layerskip_model.eagle3_model import Eagle3Model
from layerskip_model.errors import UserError
from layerskip_model.reduced_vocabulary import ReducedVocabulary
from layerskip_model.token_loss import IGNORE_INDEX
from tests.layerskip_model.small import TOLERANCE
from tests.layerskip_model.tiny_eagle import READS, packed_batch, some_head
from tests.tiny_models import CONFIGS, tiny_model

STEPS = 4
WEIGHTS = (1.0, 0.8, 0.64, 0.5)


def some_model(
    kind: str = "llama", *, reduced: bool = True, steps: int = STEPS, **changes: Any
) -> Eagle3Model:
    model = tiny_model(kind, **changes)
    head = some_head("eagle3", model, reduced=reduced)
    assert isinstance(head, Eagle3Head)
    return Eagle3Model(model, head, steps=steps)


def judged(step: int, labels: Tensor, positions: Tensor) -> list[tuple[int, int]]:
    """The places that have a token step + 2 on that counts and is of the same document."""
    rows, length = labels.shape
    return [
        (row, t)
        for row in range(rows)
        for t in range(length - step - 1)
        if positions[row, t + step + 1] - positions[row, t] == step + 1
        and labels[row, t + step + 1] != IGNORE_INDEX
    ]


@pytest.mark.parametrize("rows", [3, 4096], ids=lambda rows: f"chunk{rows}")
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
def test_losses_and_gradients_are_those_of_the_naive_twin(
    kind: str, reduced: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few places the target is asked about at once, of which each step's rows take their part."""
    monkeypatch.setattr(head_map, "CPU_CHUNK_BYTES", 4 * 64 * rows)
    module = some_model(kind, reduced=reduced).train()
    tokens, labels, positions = packed_batch()
    terms = module(tokens, labels, WEIGHTS, positions)
    terms.total.backward()
    actual = {name: value.grad for name, value in module.named_parameters()}
    module.zero_grad()

    backbone, head = module.backbone, module.head
    with torch.no_grad():
        whole = module.model(tokens, position_ids=positions, use_cache=False, output_hidden_states=True)
        embedded = backbone.embed(tokens)[:, 1:]
    features = torch.cat([whole.hidden_states[layer] for layer in READS], dim=-1) @ head.fc.weight.T
    outputs = list(unrolled(head, embedded, features[:, :-1], positions[:, :-1], STEPS))
    said = whole.logits.softmax(-1)
    kept = head.t2d.nonzero()[:, 0]
    losses, counts = [], []
    for step, output in enumerate(outputs):
        logits = head.logits(output)
        parts = []
        for row, t in judged(step, labels, positions):
            there = said[row, t + step + 1]
            if there.argmax() not in kept:
                continue
            target = there[kept] / there[kept].sum()
            parts.append(-(target * logits[row, t].log_softmax(-1)).sum())
        losses.append(torch.stack(parts).sum())
        counts.append(len(parts))
    expected = torch.stack([w * loss for w, loss in zip(WEIGHTS, losses, strict=True)]).sum()
    torch.testing.assert_close(terms.total, expected, rtol=TOLERANCE, atol=0.0)
    for loss, twin in zip(terms.losses, losses, strict=True):
        assert not loss.requires_grad
        torch.testing.assert_close(loss, twin.detach(), rtol=TOLERANCE, atol=0.0)
    assert terms.counts.tolist() == counts
    most = sum(len(judged(step, labels, positions)) for step in range(STEPS))
    assert sum(counts) < most if reduced else sum(counts) == most
    expected.backward()
    for name, value in module.named_parameters():
        if name.startswith("model."):
            assert actual[name] is None
            assert not value.requires_grad
        else:
            found, wanted = actual[name], value.grad
            assert found is not None, name
            assert wanted is not None, name
            assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), name


def test_tokens_and_targets_of_a_hand_made_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters in each step for 11 12 13 14 15, and whose distribution is the target: by index."""
    module = some_model(reduced=False, steps=3).train()
    tokens = torch.tensor([[11, 12, 13, 14, 15]])
    given: list[tuple[Tensor, Tensor]] = []
    original = module.head.inputs

    def record(embedded: Tensor, features: Tensor) -> Tensor:
        given.append((embedded[0], features[0]))
        return original(embedded, features)

    monkeypatch.setattr(module.head, "inputs", record)
    made: list[Tensor] = []
    module.head.norm.register_forward_pre_hook(lambda _, args: made.append(args[0]))
    counts = module(tokens, torch.tensor([[12, 13, 14, 15, 16]]), (1.0, 1.0, 1.0)).counts
    assert counts.tolist() == [4, 3, 2]  # 13 14 15 16, then 14 15 16, then 15 16
    of = module.backbone.embed(tokens)[0]
    for step, rows in enumerate(([1, 2, 3, 4], [2, 3, 4], [3, 4])):
        assert torch.equal(given[step][0][: len(rows)], of[rows])
    assert torch.equal(given[1][1], made[0])  # before the norm
    assert torch.equal(given[2][1], made[1])
    last = torch.full((1, 5), IGNORE_INDEX)
    last[0, 4] = 16  # it alone counts: place 3 in the first step, 2 and 1 in the others
    assert module(tokens, last, (1.0, 1.0, 1.0)).counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", [*CONFIGS])
def test_it_reads_what_enters_its_three_layers(kind: str) -> None:
    module = some_model(kind)
    tokens, _, positions = packed_batch()
    found = module.states(tokens, positions)
    whole = module.model(tokens, position_ids=positions, use_cache=False, output_hidden_states=True)
    for state, layer in zip(found, (*READS, 4), strict=True):
        torch.testing.assert_close(state, whole.hidden_states[layer])
    assert not module.backbone.layers[1]._forward_pre_hooks


def test_features_that_are_known_are_not_computed() -> None:
    module = some_model().train()
    tokens, labels, positions = packed_batch()
    known = torch.cat(module.states(tokens, positions), dim=-1).detach()
    online = module(tokens, labels, WEIGHTS, positions)
    module.model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    assert torch.equal(module(tokens, labels, WEIGHTS, positions, features=known).total, online.total)


def test_packed_documents_train_as_they_do_alone() -> None:
    module = some_model().train()
    tokens, labels, positions = packed_batch()
    packed = module(tokens[:1], labels[:1], WEIGHTS, positions[:1])
    alone = [module(tokens[:1, part], labels[:1, part], WEIGHTS) for part in (slice(0, 5), slice(5, 9))]
    torch.testing.assert_close(packed.total, alone[0].total + alone[1].total)
    assert packed.counts.tolist() == (alone[0].counts + alone[1].counts).tolist()


@pytest.mark.parametrize("reduced", [False, True])
def test_agreement_is_of_the_targets_tokens(reduced: bool) -> None:
    """Each step's first choices beside the model's own, in its ids; a token that it cannot say is never right."""
    module = some_model(reduced=reduced).eval()
    module.model.lm_head.weight.data[4:] *= (
        0.01  # tokens 1 and 3 are in the reduced vocabulary, 0 and 2 are not
    )
    module.head.projection.get_parameter("weight").data[4:] *= 0.01
    tokens, labels, positions = packed_batch()
    found = module(tokens, labels, WEIGHTS, positions)
    measures = found.measures
    assert measures is not None
    own = module.model(tokens, position_ids=positions, use_cache=False).logits.argmax(-1)
    *read, _ = module.states(tokens, positions)
    head, embedded = module.head, module.backbone.embed(tokens)[:, 1:]
    features = head.features([state[:, :-1] for state in read])
    agreed = []
    for step, output in enumerate(unrolled(head, embedded, features, positions[:, :-1], STEPS)):
        drafted = head.vocabulary.tokens()[head.logits(output).argmax(-1)]
        places = judged(step, labels, positions)
        agreed.append(sum(int(drafted[row, t] == own[row, t + step + 1]) for row, t in places))
        right = sum(int(drafted[row, t] == labels[row, t + step + 1]) for row, t in places)
        assert (measures.agreement[step + 1], measures.counts[step + 1]) == (agreed[-1], len(places))
        assert measures.top1[step + 1] == right
    assert sum(agreed) > 0
    assert measures.places <= measures.accepted


def test_what_counts_nothing_is_no_nan() -> None:
    module = some_model().train()
    tokens = packed_batch()[0]
    terms = module(tokens, torch.full_like(tokens, IGNORE_INDEX), WEIGHTS)
    terms.total.backward()
    assert terms.total.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in module.head.parameters())


def saved_bytes(module: Eagle3Model, length: int) -> int:
    """What the forward of a text keeps for its backward, each storage once, without the parameters."""
    own = {value.untyped_storage().data_ptr() for value in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(64, (1, length + 1), generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = module(tokens[:, :-1], tokens[:, 1:], [1.0] * module.steps).total
    total.backward()
    return sum(kept.values())


def test_memory_is_linear_in_steps_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither step s reads s steps' keys from a copy of them, nor is a score of two tokens kept."""
    monkeypatch.setattr(head_map, "CPU_CHUNK_BYTES", 2**14)
    used = {steps: saved_bytes(some_model(steps=steps), 64) for steps in (2, 4, 8)}
    assert used[8] - used[4] == pytest.approx(2 * (used[4] - used[2]), rel=0.02)
    more = {length: saved_bytes(some_model(steps=4), length) for length in (64, 128)}
    assert more[128] == pytest.approx(2 * more[64], rel=0.02)


def test_neither_logits_nor_scores_of_all_tokens_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                largest = max(largest, made.numel())
            return made

    monkeypatch.setattr(head_map, "CPU_CHUNK_BYTES", 4 * 4096)
    model = tiny_model(hidden_size=8, head_dim=2, intermediate_size=16, vocab_size=256)
    head = Eagle3Head(Backbone(model), ReducedVocabulary.whole(256), READS).double()
    module = Eagle3Model(model, head, steps=3)
    tokens = torch.randint(256, (2, 129))
    with Watch():
        module.train()(tokens[:, :-1], tokens[:, 1:], WEIGHTS[:3]).total.backward()
    # Step 0's causal mask, or scores where torch has no kernel for it, would be 2 x 4 x 128^2.
    assert largest < 2 * 128 * 128


def test_a_new_head_begins_with_the_targets_norm_and_lm_head() -> None:
    model = tiny_model("gemma2", dtype=torch.bfloat16)
    model.model.norm.weight.data.uniform_(0.5, 1.5)
    backbone = Backbone(model)
    vocabulary = ReducedVocabulary.most_frequent(torch.arange(64) % 7, 20)
    head = Eagle3Head(backbone, vocabulary, READS)
    assert {value.dtype for value in head.parameters()} == {torch.float32}
    hidden = torch.randn(2, 5, 32)
    expected = model.float().lm_head(model.model.norm(hidden))[..., vocabulary.tokens()]
    capped = 3.0 * torch.tanh(expected / 3.0)
    torch.testing.assert_close(head.logits(hidden), capped)
    theirs = {value.data_ptr() for value in model.parameters()}
    assert not theirs & {value.data_ptr() for value in head.parameters()}
    assert {"d2t", "t2d"} < head.state_dict().keys()


@pytest.mark.parametrize("kind", [*CONFIGS])
def test_a_target_without_values_makes_a_head_without(kind: str) -> None:
    with torch.device("meta"):
        model = tiny_model(kind)
    head = Eagle3Head(Backbone(model), ReducedVocabulary.most_frequent(torch.arange(64), 20), READS)
    assert all(value.is_meta for value in head.parameters())


def test_the_layers_read_by_default_are_the_papers() -> None:
    assert feature_layers(32) == (2, 16, 29)
    assert feature_layers(36) == (2, 18, 33)
    assert feature_layers(80) == (2, 40, 77)
    assert feature_layers(7) == (2, 3, 4)
    assert feature_layers(12, [1, 5, 11]) == (1, 5, 11)


@pytest.mark.parametrize(
    ("layers", "given", "fix"),
    [
        (
            6,
            None,
            "[2, 3, 3] are not three different layers in order of a model of 6; give three of 1 to 5 in order",
        ),
        (
            4,
            None,
            "[2, 2, 1] are not three different layers in order of a model of 4; give three of 1 to 3 in order",
        ),
        (3, None, "too shallow for EAGLE-3; use EAGLE"),
        (12, [3, 3, 9], "such as [2, 6, 9]"),
        (12, [0, 3, 9], "give three of 1 to 11"),
        (12, [3, 6, 12], "give three of 1 to 11"),
        (12, [3, 6], "[3, 6] are not three different layers"),
    ],
)
def test_layers_that_coincide_or_are_not_there_are_refused(layers: int, given: Any, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        feature_layers(layers, given)
    assert fix in str(caught.value)
    assert str(caught.value).startswith("feature_layers: ")
    assert "\n" not in str(caught.value)


def test_a_layer_of_which_no_head_can_be_made_is_refused() -> None:
    """Its attention has its projections under other names."""
    model = tiny_model()
    layer = copy.deepcopy(model.model.layers[0])
    for name in ("q", "k", "v"):
        setattr(layer.self_attn, f"w{name}", getattr(layer.self_attn, f"{name}_proj"))
        delattr(layer.self_attn, f"{name}_proj")
    with pytest.raises(UserError, match=r"^model type 'llama' has none of q_proj, k_proj, v_proj, qkv_proj"):
        JoinedLayer(layer, Backbone(model))
