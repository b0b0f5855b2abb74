"""What is refused before anything is written: packages that are not there, attention that cannot be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layerskip_model.errors import UserError
from tests.train.small_recipe import small_values, write_documents
from train import preflight
from train.config import parse_recipe
from train.preflight import check_inputs


def checked(tmp_path: Path, **changes: Any) -> None:
    """Look at a small recipe whose data is there; `changes` replace top-level keys or extend mappings."""
    values = small_values()
    values["data"]["train"][0]["files"] = write_documents(tmp_path)
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    check_inputs(parse_recipe(values))


def test_a_small_recipe_passes(tmp_path: Path) -> None:
    checked(tmp_path, model={"lora": {"rank": 2}})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"lora": {"rank": 2}}}, "model.lora: the peft package is not installed; pip install peft"),
        (
            {"optimizer": {"kind": "adamw_8bit"}},
            "optimizer.kind: adamw_8bit: the bitsandbytes package is not installed; pip install bitsandbytes",
        ),
    ],
)
def test_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    checked(tmp_path)
    with pytest.raises(UserError) as caught:
        checked(tmp_path, **changes)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("micro", [None, 2])
def test_flash_attention_cannot_keep_documents_of_several_rows_apart(
    tmp_path: Path, micro: int | None
) -> None:
    flash = {"attn_implementation": "flash_attention_2"}
    with pytest.raises(UserError, match=r"keeps documents apart only where a forward has one sequence, not "):
        checked(tmp_path, model=flash, batch={"micro": micro})
    for allowed in ({"batch": {"micro": 1}}, {"data": {"documents": "joined"}}):
        with pytest.raises(UserError, match="FlashAttention"):  # the package is not there
            checked(tmp_path, model=flash, **allowed)


def test_an_adapter_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.lora\.targets: 'wq' is no linear map"):
        checked(tmp_path, model={"lora": {"targets": ["wq"]}})


def test_quantization_needs_bitsandbytes_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"name_or_path": "somewhere", "quantization": "4bit"}
    recipe = parse_recipe(small_values(model=model, objective={"kind": "medusa"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"model\.quantization: 4bit needs a CUDA GPU, and there is none; leave it out"
    ):
        check_inputs(recipe)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.quantization: the bitsandbytes package is not installed"):
        check_inputs(recipe)
