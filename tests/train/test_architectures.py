"""The published sizes of real models, and one step of the smallest cut-down one by command."""

from __future__ import annotations

import pytest
import torch

from layerskip_model.errors import UserError
from layerskip_model.head_map import CPU_CHUNK_BYTES
from train.architectures import ARCHITECTURES, layerskip_recipe, measured_peak, needs_of, table
from train.memory import estimate
from train.model import outline_model

PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
    "gemma-2-2b": 2_614_341_888,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-2-13b": 13_015_864_320,
    "codellama-34b": 33_743_970_304,
    "llama-2-70b": 68_976_648_192,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_has_as_many_parameters_as_the_published_one(name: str) -> None:
    model = outline_model(layerskip_recipe(name, micro=1, length=64).model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_an_unknown_one_is_named() -> None:
    with pytest.raises(UserError, match=r"^architecture 'llama-4': not known; there are llama-3\.2-1b, "):
        layerskip_recipe("llama-4", micro=1, length=64)


def test_a_table_by_command(capsys: pytest.CaptureFixture[str]) -> None:
    table(["qwen3-0.6b"], ranks=4, length=64, micro=1)
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head.startswith("| | one GPU | one GPU, 8-bit | one GPU, LoRA | ZeRO-2, 4 | ")
    assert rule == "|---|" + "---|" * 8
    assert row.startswith("| qwen3-0.6b | 1")  # 16 bytes a parameter on one GPU


def test_a_step_is_measured_beside_its_estimate() -> None:
    given = layerskip_recipe("qwen3-0.6b", micro=1, length=16, layers=2)
    assert given.model.config is not None
    small = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    model = given.model.model_copy(update={"config": given.model.config | small})
    given = given.model_copy(update={"model": model})
    expected = estimate(needs_of(given, CPU_CHUNK_BYTES), "one process", 1, checkpointing=False)
    assert expected.peak == pytest.approx(measured_peak(given, torch.device("cpu")), rel=0.1)
