"""What a head said when it was exported: against a naive twin, and who else would be off by how much."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from layerskip_model.backbone import Backbone
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.eagle3_model import Eagle3Model
from layerskip_model.eagle_model import EagleModel
from layerskip_model.head_probe import LENGTH, STEPS, Probe, distance, is_in_one_place, said, take_probe
from tests.layerskip_model.tiny_eagle import READS, half_of, some_head
from tests.tiny_models import tiny_model


def module(kind: str, *, reduced: bool = False) -> Any:
    model = tiny_model()
    head: Any = some_head(kind, model, reduced=reduced)
    return EagleModel(model, head) if kind == "eagle" else Eagle3Model(model, head)


def naive(made: Any, tokens: list[int], place: int, step: int) -> float:
    """The log-probability by a pass over the text up to that place and the head's own outputs after it."""
    head, backbone = made.head, Backbone(made.model)
    states = made.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    if isinstance(head, Eagle3Head):
        features = head.features([states[layer] for layer in READS])[0, : place + 1]
    else:
        features = states[-1][0, : place + 1]  # after the final norm
    for done in range(step + 1):
        embedded = backbone.embed(torch.tensor([tokens[1 : place + 2 + done]]))
        inputs = head.inputs(embedded, features[None])
        output = head.layer(inputs)[0]
        features = torch.cat((features, output[-1:]))
    log_probs = head.logits(output[-1]).log_softmax(-1)
    own = torch.tensor([tokens[place + step + 2]])
    own = head.vocabulary.from_target(own) if isinstance(head, Eagle3Head) else own
    return log_probs[own].item()


@pytest.mark.parametrize(("kind", "reduced"), [("eagle", False), ("eagle3", False), ("eagle3", True)])
def test_it_is_what_the_head_says_place_by_place(kind: str, reduced: bool) -> None:
    made = module(kind, reduced=reduced).train()
    probe = take_probe(made, torch.float32)
    assert made.training
    assert not made.model.training
    assert len(probe.tokens) == LENGTH
    assert [len(step) for step in probe.log_probs] == [LENGTH - 2 - step for step in range(STEPS)]
    if reduced:
        assert half_of().t2d[torch.tensor(probe.tokens)].all()
    with torch.no_grad():
        for step, place in ((0, 0), (0, 17), (0, LENGTH - 3), (1, 0), (1, 23), (1, LENGTH - 4)):
            expected = naive(made, probe.tokens, place, step)
            assert probe.log_probs[step][place] == pytest.approx(expected, rel=1e-5)


def test_a_token_that_it_cannot_say_has_no_probability() -> None:
    made = module("eagle3", reduced=True)
    absent = int((~half_of().t2d).nonzero()[0])
    tokens = torch.tensor([1, 3, 4, absent, 6])
    with torch.no_grad():
        first, _ = said(
            made.head, Backbone(made.model).embed(tokens[None, 1:]), torch.zeros(1, 4, 32), tokens
        )
    assert first.isfinite().tolist() == [True, False, True]


def test_the_coarsest_dtype_is_told() -> None:
    assert take_probe(module("eagle"), torch.float64).dtype == "float64"
    assert take_probe(module("eagle"), torch.bfloat16).dtype == "bfloat16"


def test_the_distance_is_relative_to_the_spread() -> None:
    probe = Probe([1, 2, 3, 4], [[-1.0, -3.0], [-5.0]], "float32")
    same = [torch.tensor([-1.0, -3.0]), torch.tensor([-5.0])]
    assert distance(probe, same) == 0.0
    assert distance(probe, [step + 1.0 for step in same]) == pytest.approx(1.0 / 2.0)
    assert math.isinf(distance(probe, [same[0] - torch.inf, same[1]]))


def test_a_module_that_is_split_cannot_be_run_here() -> None:
    made = module("eagle")
    assert is_in_one_place(made)
    next(made.head.parameters()).ds_id = 3  # as DeepSpeed marks what it has split
    assert not is_in_one_place(made)
    with torch.device("meta"):
        assert not is_in_one_place(torch.nn.Linear(2, 2))
