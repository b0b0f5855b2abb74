"""A draft layer is a layer of the target: the same numbers as a model of one layer, documents apart."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from layerskip_model.backbone import Backbone
from layerskip_model.draft_layer import DraftLayer
from tests.tiny_models import CONFIGS, tiny_model

TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(5))
PACKED = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1]])
KINDS = [*CONFIGS]


def only_layer(kind: str, attention: str | None = None) -> tuple[Backbone, DraftLayer]:
    """A model of one layer, and a draft layer with that one's weights."""
    backbone = Backbone(tiny_model(kind, num_hidden_layers=1, attention=attention))
    draft = DraftLayer(backbone).double()
    draft.layer.load_state_dict(backbone.layers[0].state_dict())
    return backbone, draft


def through(backbone: Backbone, draft: DraftLayer, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
    """What a model of the draft layer alone would compute: embedding, layer, final norm."""
    return backbone.norm(draft(backbone.embed(tokens), position_ids))


@pytest.mark.parametrize("position_ids", [None, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_a_model_of_one_layer_does(kind: str, position_ids: Tensor | None) -> None:
    """Rotary tables, windows and document masks included: that model's own forward is the twin."""
    backbone, draft = only_layer(kind)
    with torch.no_grad():
        expected = backbone.final_states(TOKENS, position_ids)
        actual = through(backbone, draft, TOKENS, position_ids)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_packed_documents_are_as_they_are_alone(kind: str, attention: str) -> None:
    backbone, draft = only_layer(kind, attention)
    hidden = backbone.embed(TOKENS).detach()
    packed = draft(hidden, PACKED)
    for row, starts in enumerate(((0, 7, 12), (0, 2, 10, 12))):
        for begin, end in pairwise(starts):
            torch.testing.assert_close(packed[row, begin:end], draft(hidden[row : row + 1, begin:end])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_its_weights_are_its_own(kind: str) -> None:
    """float32 like everything that trains, whatever the target's dtype is; the target's get no gradient."""
    backbone = Backbone(tiny_model(kind, dtype=torch.bfloat16).requires_grad_(False))
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    torch.manual_seed(0)
    draft = DraftLayer(backbone)
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}
    assert draft.layer.state_dict().keys() == backbone.layers[0].state_dict().keys()
    assert {name.split(".")[0] for name in draft.state_dict()} == {"layer"}
    matrices = [parameter for parameter in draft.parameters() if parameter.ndim > 1]
    assert all(0.5 < matrix.std() / backbone.config.initializer_range < 2 for matrix in matrices)
    draft(torch.randn(2, 12, 32, dtype=torch.bfloat16), PACKED).square().sum().backward()
    assert all(parameter.grad is not None for parameter in draft.parameters())
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())
    torch.manual_seed(0)
    again = DraftLayer(backbone)
    assert all(torch.equal(a, b) for a, b in zip(draft.parameters(), again.parameters(), strict=True))


def test_a_target_without_values_makes_one_without() -> None:
    with torch.device("meta"):
        draft = DraftLayer(Backbone(tiny_model("qwen3")))
    assert all(parameter.is_meta for parameter in draft.parameters())
