"""EAGLE heads as a few torch calls against their own modules, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerskip_model.backbone import Backbone
from layerskip_model.fused_head import FusedHead
from layerskip_model.fused_layer import FusedJoinedLayer, NotFusible, fuse
from layerskip_model.layer_runner import LayerRunner
from tests.layerskip_model.test_fused_layer import Growing, model_of
from tests.layerskip_model.tiny_eagle import Head, some_head
from tests.tiny_models import tiny_model

CHUNKS = [5, 3, 1]
TOLERANCE = 1e-5  # norms and softmaxes of modules compute in float32


def head_of(kind: str, model_type: str) -> tuple[Head, Backbone]:
    model = model_of(model_type).double()
    return some_head(kind, model).requires_grad_(False).eval(), Backbone(model)


def given(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, sum(CHUNKS), width, generator=generator, dtype=torch.float64)


def runner_of(head: Head, backbone: Backbone) -> LayerRunner:
    layer = head.layer
    windows = {layer.kind: layer._window}
    device, dtype = backbone.head.weight.device, torch.float64
    return LayerRunner(backbone, [layer.layer], [layer.kind], windows, device=device, dtype=dtype)


@torch.inference_mode()
def run_in_chunks(runner: LayerRunner, inputs: Tensor) -> Tensor:
    cache, tables, begin, outputs = Growing(), runner.tables(16, 16), 0, []
    for part in inputs.split(CHUNKS, dim=1):
        outputs.append(runner.run(part, 0, 1, runner.span(cache, tables, begin, part.shape[1])))
        begin += part.shape[1]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "qwen2", "gemma"])
def test_a_fused_layer_over_a_cache_computes_what_the_module_does(kind: str, model_type: str) -> None:
    """Families with norms of queries and keys, with biases, with other norms than torch's, with a window."""
    head, backbone = head_of(kind, model_type)
    inputs = given(head.layer.width, 1)
    with torch.inference_mode():
        expected = head.layer(inputs)
    runner = runner_of(head, backbone)
    assert runner.fused is not None
    assert isinstance(runner.fused[0], FusedJoinedLayer) == (kind == "eagle3")
    torch.testing.assert_close(run_in_chunks(runner, inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)
    with torch.inference_mode():  # its weights are still the module's
        assert torch.equal(head.layer(inputs), expected)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("model_type", ["llama", "gemma", "gemma2"])
def test_what_is_around_the_layer_is_the_same(kind: str, model_type: str) -> None:
    """With another norm than torch's, and with a soft cap."""
    head, backbone = head_of(kind, model_type)
    fused = FusedHead(head, backbone)
    embedded, features = given(32, 2), given(32, 3)
    with torch.inference_mode():
        torch.testing.assert_close(fused.inputs(embedded, features), head.inputs(embedded, features))
        logits = head.logits(features)
        torch.testing.assert_close(fused.logits(features), logits, rtol=TOLERANCE, atol=TOLERANCE)
    assert (backbone.head_map().softcap is None) == (model_type != "gemma2")


def test_layers_with_other_parts_are_not_fused() -> None:
    for model_type in ("gemma2", "gemma3", "olmo2", "phi3"):
        head = some_head("eagle3", tiny_model(model_type))
        with pytest.raises(NotFusible):
            fuse([head.layer.layer])
    head = some_head("eagle3", tiny_model())
    head.layer.layer.extra = torch.nn.Identity()
    with pytest.raises(NotFusible):
        fuse([head.layer.layer])
