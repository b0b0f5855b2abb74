"""A document in a row of several is computed as if it were alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerskip_model.early_exit import EarlyExitModel, ExitLoss
from layerskip_model.layer_dropout import LayerDropout
from layerskip_model.token_loss import IGNORE_INDEX
from tests.tiny_models import tiny_model
from tests.train.tiny_tokens import END, packed_documents, packed_examples
from train.data.packing import ExampleRows, WindowRows

LENGTHS = (3, 9, 2, 14, 5, 7, 4, 12)
# All but llama have windows of 5 tokens, gemma in every other layer; transformers has no sdpa for gemma2.
MODELS = [(kind, attention) for kind in ("llama", "mistral", "gemma3") for attention in ("eager", "sdpa")]
MODELS.append(("gemma2", "eager"))


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [[0, *torch.randint(2, 64, (length,), generator=generator).tolist(), END] for length in LENGTHS]


def stacked(rows: WindowRows | ExampleRows) -> dict[str, Tensor]:
    return {key: torch.stack([rows[i][key] for i in range(len(rows))]) for key in rows[0]}


def pieces(batch: dict[str, Tensor]) -> list[tuple[int, slice]]:
    """Where each document, or its part in a row, is: (row, places)."""
    found = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        begins = [i for i, position in enumerate(positions) if position == 0]
        ends = [*begins[1:], len(positions)]
        found += [(row, slice(begin, end)) for begin, end in zip(begins, ends, strict=True)]
    return found


@pytest.mark.parametrize(("kind", "attention"), MODELS)
def test_logits_are_those_of_the_document_alone(tmp_path: Path, kind: str, attention: str) -> None:
    model = tiny_model(kind, attention=attention)
    batch = stacked(WindowRows(packed_documents(tmp_path, documents()), 16, separate=True))
    assert len(batch["input_ids"]) > 1
    inputs = batch["input_ids"]
    with torch.no_grad():
        together = model(input_ids=inputs, position_ids=batch["position_ids"], use_cache=False).logits
        joined = model(input_ids=inputs, use_cache=False).logits
        for row, places in pieces(batch):
            alone = model(input_ids=inputs[row : row + 1, places], use_cache=False).logits[0]
            torch.testing.assert_close(
                together[row, places], alone, rtol=1e-5, atol=1e-5
            )  # eager's softmax is in float32
            if places.start > 0:
                assert (joined[row, places] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["windows", "examples"])
@pytest.mark.parametrize(("kind", "attention"), MODELS)
def test_losses_with_layer_dropout_are_the_sums_of_the_documents_own(
    tmp_path: Path, kind: str, attention: str, form: str
) -> None:
    rows: WindowRows | ExampleRows
    if form == "windows":
        rows = WindowRows(packed_documents(tmp_path, documents()), 16, separate=True)
    else:
        examples = [(ids, [i > 1 for i in range(len(ids))]) for ids in documents()]
        rows = ExampleRows(packed_examples(tmp_path, examples), 16, separate=True)
    batch = stacked(rows)
    model = tiny_model(kind, attention=attention).train()
    exit_loss = ExitLoss(4, 10, exits=[1, 2, 3, 4], weights="sum", e_scale=1.0, curriculum="none", every=1)
    dropout = LayerDropout(
        p_max=0.6,
        over_depth="constant",
        over_time="constant",
        layers="all",
        num_layers=4,
        total_steps=10,
        seed=0,
    )
    module = EarlyExitModel(model, exit_loss, dropout)
    number = len(batch["input_ids"])
    kept = dropout.kept(5, list(range(number)))
    assert (kept.any(axis=1) & ~kept.all(axis=1)).any()  # some layer takes some of the rows
    with torch.no_grad():
        together = module(
            batch["input_ids"], batch["labels"], list(range(number)), 5, position_ids=batch["position_ids"]
        ).cross_entropy
        sums = dict.fromkeys(together, 0.0)
        for row, places in pieces(batch):
            labels = batch["labels"][row : row + 1, places]
            if (labels != IGNORE_INDEX).any():
                terms = module(batch["input_ids"][row : row + 1, places], labels, [row], 5)
                for exit_layer, value in terms.cross_entropy.items():
                    sums[exit_layer] += float(value)
    assert len(together) > 2
    for exit_layer, value in together.items():
        assert float(value) == pytest.approx(sums[exit_layer], rel=1e-5)
