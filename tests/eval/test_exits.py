"""The quality of exits against full logits, and the documents and windows that it is measured on."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.exits import Answer, heldout_texts, measure_exits, window_length
from eval.target import Target
from layerskip_model.errors import UserError

TEXTS = ["def chloé(value):\n    return 1\n", "x", "anna = bert\n" * 9]


@torch.no_grad()
def naive(target: Target, texts: list[str], length: int) -> dict[int, list[float]]:
    """Window by window without padding: exit -> nats, correct, agreeing, tokens."""
    model: Any = target.model
    sums = {layer: [0.0, 0, 0, 0] for layer in range(1, 5)}
    for text in texts:
        stream = [
            target.tokenizer.eos_token_id,
            *target.tokenizer(text, add_special_tokens=False)["input_ids"],
        ]
        for start in range(0, len(stream) - 1, length):
            window = stream[start : start + length + 1]
            inputs, labels = torch.tensor([window[:-1]]), torch.tensor(window[1:])
            states = model(input_ids=inputs, output_hidden_states=True).hidden_states
            final = model.lm_head(states[-1][0])  # the last one is normed already
            for layer, total in sums.items():
                logits = final if layer == 4 else model.lm_head(model.model.norm(states[layer][0]))
                nll = -torch.log_softmax(logits.double(), -1)[range(len(labels)), labels]
                total[0] += float(nll.sum())
                total[1] += int((logits.argmax(-1) == labels).sum())
                total[2] += int((logits.argmax(-1) == final.argmax(-1)).sum())
                total[3] += len(labels)
    return sums


@pytest.mark.parametrize(("length", "batch"), [(7, 3), (128, 8), (1, 64)])
def test_exits_equal_the_models_own_logits(tiny_target: Target, length: int, batch: int) -> None:
    expected = naive(tiny_target, TEXTS, length)
    found = measure_exits(tiny_target.model, tiny_target.tokenizer, TEXTS, length, batch)
    assert [quality.layer for quality in found] == [1, 2, 3, 4]
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    for quality in found:
        nats, correct, agreeing, tokens = expected[quality.layer]
        assert quality.tokens == tokens
        assert quality.cross_entropy == pytest.approx(nats / tokens, rel=1e-5)
        assert quality.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
        assert quality.top1 == pytest.approx(correct / tokens)
        assert quality.agreement == pytest.approx(agreeing / tokens)
    assert found[-1].agreement == 1.0
    assert found[0].agreement < 1.0


def test_every_token_is_predicted_once(tiny_target: Target) -> None:
    tokens = sum(len(tiny_target.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS)
    for length in (1, 3, 7, 64):
        found = measure_exits(tiny_target.model, tiny_target.tokenizer, TEXTS, length)
        assert {quality.tokens for quality in found} == {tokens}


def test_the_model_is_as_it_was(tiny_target: Target) -> None:
    measure_exits(tiny_target.model, tiny_target.tokenizer, TEXTS, 16)
    layers: Any = tiny_target.model.get_decoder().layers
    assert not any("forward" in vars(layer) for layer in layers)
    with pytest.raises(UserError, match="no tokens"):
        measure_exits(tiny_target.model, tiny_target.tokenizer, [""], 16)
    assert not any("forward" in vars(layer) for layer in layers)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_one_document_are_joined_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "a", "response": "b", "document": 5},
        {"prompt": "c", "response": "d", "document": 5},
        {"prompt": "e", "document": "other"},
        {"text": "f"},
        {"text": "g"},
        {"prompt": "", "response": ""},
        {"prompt": "h", "response": None, "document": 5},
        {"text": "i", "document": 9},
        {"text": "j"},  # line 9, and no part of document 9
    )
    assert heldout_texts(path) == ["abcd", "e", "f", "g", "h", "i", "j"]


def test_the_held_out_file_of_a_run_is_its_documents(finished_run: Path) -> None:
    texts = heldout_texts(finished_run / "heldout.jsonl")
    originals = sorted(path.read_text("utf-8") for path in finished_run.parent.glob("heldout-*.txt"))
    assert sorted(map(str, texts)) == originals


def test_of_an_answer_only_the_response_is_measured(tiny_target: Target) -> None:
    """The same numbers as from the model's logits after the prompt's own tokens."""
    answer = Answer("def f(x):\n", "    return x", special_tokens=True)
    tokenizer = tiny_target.tokenizer
    prompt = tokenizer(answer.prompt)["input_ids"]
    response = tokenizer(answer.response, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = tiny_target.model(input_ids=torch.tensor([prompt + response])).logits[
            0, len(prompt) - 1 : -1
        ]
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum")
    for length in (len(prompt + response) + 3, len(prompt + response) - 1):
        last = measure_exits(tiny_target.model, tokenizer, [answer], length)[-1]
        assert last.tokens == len(response)
        assert last.cross_entropy * last.tokens == pytest.approx(float(nats), rel=1e-5)
        assert last.bits_per_byte == pytest.approx(float(nats) / math.log(2) / len(answer.response), rel=1e-5)


def test_a_file_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows with text"):
        heldout_texts(write(tmp_path / "a.jsonl", {"turns": ["x"]}))
    with pytest.raises(UserError, match="cannot be read"):
        heldout_texts(tmp_path / "missing.jsonl")


def test_window_lengths(tiny_target: Target) -> None:
    assert window_length(tiny_target, None) == 32  # the training length
    assert window_length(tiny_target, 128) == 128
    for wrong in (0, -1, 129):
        with pytest.raises(UserError, match=f"--context_length {wrong}: .* 1 to 128"):
            window_length(tiny_target, wrong)


def test_a_tokenizer_without_a_first_token_is_refused(tiny_target: Target) -> None:
    tokenizer = copy.deepcopy(tiny_target.tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="no bos_token and no eos_token"):
        measure_exits(tiny_target.model, tokenizer, TEXTS, 16)
