"""The loop against naive computations: accumulation, held-out evaluation, divergence, precision."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from layerskip_model.layer_dropout import LayerDropout
from tests.train.tiny_runs import (
    EQUAL_ADAMW,
    assert_close_logs,
    assert_close_weights,
    assert_equal_weights,
    log_lines,
    recipe_values,
    tiny_recipe,
    write_recipe,
    write_text,
)
from train import UserError, loop, parse_recipe, train
from train.checkpoint import list_checkpoints
from train.data.batches import StepBatches
from train.data.mixing import EpochOrder
from train.data.packing import Rows, WindowRows
from train.data.tokens import PackedTokens
from train.objectives import OBJECTIVES
from train.objectives.layerskip import LayerSkip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with whole batches on one process."""
    return train(tiny_recipe(tmp_path_factory.mktemp("whole") / "run", text))


def test_the_reference_run_drops_rows_and_clips(whole: Path) -> None:
    dropout = LayerDropout(0.6, "exp", "constant", "all", num_layers=4, total_steps=4, seed=0)
    kept = [dropout.kept(step, range(8)) for step in range(4)]
    assert [int(step[3].sum()) for step in kept] == [1, 4, 0, 3]  # rows that run the last layer
    assert all(line["gradient_norm"] > EQUAL_ADAMW["clip_norm"] for line in log_lines(whole)[:-1])


def test_the_learning_rate_follows_the_schedule(whole: Path) -> None:
    rates = [line["learning_rate"] for line in log_lines(whole) if "loss" in line]
    falling = [0.5 * (1 + math.cos(math.pi * done / 3)) for done in (1, 2, 3)]
    assert rates == pytest.approx([0.005 * factor for factor in [1.0, *falling]], abs=1e-12)


@pytest.mark.parametrize(
    ("micro", "checkpointing"), [(4, False), (3, False), (1, False), (None, True), (4, True)]
)
def test_micro_batches_equal_the_whole_batch(
    micro: int | None, checkpointing: bool, text: Path, whole: Path, tmp_path: Path
) -> None:
    batch = {"sequences": 8, "length": 16, "micro": micro}
    values = recipe_values(tmp_path / "run", text, batch=batch)
    values["model"]["activation_checkpointing"] = checkpointing
    train(parse_recipe(values))
    assert_close_weights(tmp_path / "run", whole)
    assert_close_logs(tmp_path / "run", whole)


class MaskedRows:
    """Rows with very different numbers of labels: 1 to 16."""

    def __init__(self, windows: Rows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        example = self.windows[row]
        masked = torch.arange(16) > row * 5 % 16
        return example | {"labels": example["labels"].masked_fill(masked, -100)}


class MaskedLayerSkip(LayerSkip):
    """LayerSkip on those rows, remembering its model's first gradients."""

    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]

    @classmethod
    def build(cls, recipe: Any, model: PreTrainedModel) -> MaskedLayerSkip:
        objective = super().build(recipe, model)
        MaskedLayerSkip.initial = {name: value.clone() for name, value in model.state_dict().items()}
        MaskedLayerSkip.gradients = {}
        for name, parameter in model.named_parameters():
            if parameter.device.type != "meta":
                parameter.register_post_accumulate_grad_hook(
                    lambda p, name=name: cls.gradients.__setitem__(name, p.grad.clone())
                )
        return objective

    def rows(self, windows: Rows, part: Literal["train", "heldout"]) -> Rows:
        return MaskedRows(windows)


@pytest.mark.parametrize("micro", [8, 1, 3])
def test_one_division_over_the_global_batch(
    micro: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With labels masked unevenly: the gradient is that of the mean over all tokens, however the batch is cut."""
    monkeypatch.setitem(OBJECTIVES, "layerskip", MaskedLayerSkip)
    recipe = tiny_recipe(
        tmp_path / "run",
        text,
        max_steps=1,
        batch={"sequences": 8, "length": 16, "micro": micro},
        objective={"kind": "layerskip"},
        optimizer=EQUAL_ADAMW | {"clip_norm": None},
    )
    train(recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export").train()
    model.load_state_dict(MaskedLayerSkip.initial)
    rows = MaskedRows(training_rows(tmp_path / "run"))
    batch = next(iter(StepBatches(rows, EpochOrder(len(rows), 0), 8, 8, start=0, stop=1)))[0]
    logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits.flatten(
        0, 1
    )  # [tokens, vocab]
    loss = functional.cross_entropy(logits, batch["labels"].flatten(), ignore_index=-100)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert log_lines(tmp_path / "run")[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log_lines(tmp_path / "run")[0]["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(MaskedLayerSkip.gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    means = functional.cross_entropy(
        logits.unflatten(0, (8, 16)).transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none"
    ).sum(1) / (batch["labels"] != -100).sum(1)
    assert means.mean().item() != pytest.approx(loss.item(), rel=1e-3)  # what a division per row would give


def tokens_of(run: Path, part: str) -> PackedTokens:
    [directory] = (run / "data").glob(f"{part}-*")
    return PackedTokens.open(directory)


def training_rows(run: Path) -> WindowRows:
    return WindowRows(tokens_of(run, "train"), 16, separate=True)


def positions_in(window: torch.Tensor) -> torch.Tensor:
    """From 0 at the window's begin and at each end of text, which begins a document."""
    positions: list[int] = []
    for token in window.tolist():
        positions.append(positions[-1] + 1 if positions and token != 0 else 0)
    return torch.tensor(positions)


def naive_exits(run: Path, limit: int | None) -> dict[str, float]:
    """Held-out metrics from full logits of the exported model's own forward, in float64."""
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float64)
    packed = tokens_of(run, "heldout")
    stream = torch.from_numpy(packed.ids().astype("int64"))  # [tokens]
    windows = [stream[i : i + 17] for i in range(0, len(stream) - 1, 16)]
    number = min(limit or len(windows), len(windows))
    windows = [windows[i * len(windows) // number] for i in range(number)]
    sums: dict[str, float] = {}
    runs: dict[str, list[int]] = {}
    tokens = 0
    for window in windows:
        positions = positions_in(window[:-1])
        with torch.no_grad():
            # With a cache transformers would not look for documents in the positions.
            output = model(
                window[None, :-1], position_ids=positions[None], output_hidden_states=True, use_cache=False
            )
        tokens += len(window) - 1
        last = output.logits[0].argmax(-1)
        for exit_layer, hidden in enumerate(output.hidden_states[1:], start=1):
            logits = output.logits[0] if exit_layer == 4 else model.lm_head(model.model.norm(hidden))[0]
            nats = functional.cross_entropy(logits, window[1:], reduction="sum")
            for name, value in (
                ("loss", nats),
                ("top1", (logits.argmax(-1) == window[1:]).sum()),
                ("agreement", (logits.argmax(-1) == last).sum()),
            ):
                key = f"heldout/exit_{exit_layer}/{name}"
                sums[key] = sums.get(key, 0.0) + float(value.detach())
            if exit_layer < 4:
                for drafts in (2, 4, 8):
                    key = f"heldout/exit_{exit_layer}/accepted_{drafts}"
                    agreed = (logits.argmax(-1) == last).tolist()
                    runs.setdefault(key, []).extend(naive_runs(agreed, positions.tolist(), drafts))
    means = {name: total / tokens for name, total in sums.items()}
    means |= {name: sum(lengths) / len(lengths) for name, lengths in runs.items()}
    means["heldout/loss"] = means["heldout/exit_4/loss"]
    bits = means["heldout/loss"] * (packed.tokens - 1) / math.log(2.0)
    return means | {"heldout/bits_per_byte": bits / packed.bytes}


def naive_runs(agreed: list[bool], positions: list[int], drafts: int) -> list[int]:
    """Wherever `drafts` tokens of one document follow: how many of them agree before the first that does not."""
    starts = [i for i in range(len(agreed) - drafts + 1) if 0 not in positions[i + 1 : i + drafts]]
    return [[*agreed[i : i + drafts], False].index(False) for i in starts]


@pytest.mark.parametrize("limit", [None, 5])
def test_held_out_metrics_equal_a_naive_computation(
    limit: int | None, text: Path, whole: Path, tmp_path: Path
) -> None:
    run = whole
    if limit is not None:
        run = train(tiny_recipe(tmp_path / "run", text, evaluate={"sequences": limit}))
    logged = [line for line in log_lines(run) if "heldout/loss" in line]
    assert [line.pop("step") for line in logged] == [4]
    assert logged[0] == pytest.approx(naive_exits(run, limit), rel=1e-5)
    documents = (run / "heldout.jsonl").read_text().splitlines()
    held_out = "".join(row["prompt"] + row["response"] for row in map(json.loads, documents))
    assert len(held_out.encode()) == tokens_of(run, "heldout").bytes


def test_the_final_evaluation_is_done_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    evaluate = loop.evaluate

    def counted(run: Any, done: int) -> dict[str, float]:
        calls.append(done)
        return evaluate(run, done)

    monkeypatch.setattr(loop, "evaluate", counted)
    run = train(tiny_recipe(tmp_path / "run", text, evaluate={"every": 2}))
    assert calls == [2, 4]
    assert [line["step"] for line in log_lines(run) if "heldout/loss" in line] == [2, 4]


def test_run_json_comes_last(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run_file = loop.write_run_file
    present: list[str] = []

    def spy(directory: Path, *args: Any, **kwargs: Any) -> None:
        present.extend(sorted(path.name for path in directory.iterdir()))
        write_run_file(directory, *args, **kwargs)

    monkeypatch.setattr(loop, "write_run_file", spy)
    run = train(tiny_recipe(tmp_path / "run", text))
    assert {"export", "heldout.jsonl", "log.jsonl", "recipe.yaml"} <= set(present)
    assert "run.json" not in present
    told = json.loads((run / "run.json").read_text())
    assert told["suggested"]["strategy"] == "self_speculative"
    assert told["training"] == {"steps": 4, "tokens": 4 * 8 * 16, "engine": "whole", "processes": 1}
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    assert len(AutoTokenizer.from_pretrained(run / "export")) <= model.config.vocab_size


class Diverging(LayerSkip):
    """Its loss, or only its gradient, is no number any more in step 5."""

    where = "loss"

    def forward(self, batch: Any, step: int, denominators: dict[str, float]) -> Any:
        loss, metrics = super().forward(batch, step, denominators)
        if self.training and step == 5:
            if self.where == "loss":
                loss = loss * math.nan
                metrics["loss"] = (loss, 1)
            else:
                loss.register_hook(lambda gradient: gradient * math.inf)
        return loss, metrics


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_divergence_is_one_line_and_spares_the_checkpoints(
    where: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(OBJECTIVES, "layerskip", Diverging)
    monkeypatch.setattr(Diverging, "where", where)
    values = recipe_values(
        tmp_path / "run", text, max_steps=12, log={"every": 12}, checkpoint={"every": 2, "keep": 2}
    )
    path = write_recipe(tmp_path / "recipe.yaml", values)
    monkeypatch.setattr(sys, "argv", ["train", str(path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("train", run_name="__main__")
    assert ended.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert error[0].startswith(f"error: the {where}")
    assert "by step 6; lower optimizer.lr" in error[0]
    assert "step-00000004" in error[0]
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000002", "step-00000004"]
    for path in saved:
        assert all(tensor.isfinite().all() for tensor in load_file(path / "trainable.safetensors").values())
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_loss_that_is_no_number_is_not_logged(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "layerskip", Diverging)
    with pytest.raises(UserError, match=r"the loss is nan by step 6; .*newest checkpoint: none"):
        train(tiny_recipe(tmp_path / "run", text, max_steps=12))
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_bfloat16_autocast_keeps_float32_masters(text: Path, whole: Path, tmp_path: Path) -> None:
    values = recipe_values(tmp_path / "run", text)
    values["model"]["autocast"] = "bfloat16"
    run = train(parse_recipe(values))
    losses = [[line["loss"] for line in log_lines(path) if "loss" in line] for path in (run, whole)]
    assert losses[0] == pytest.approx(
        losses[1], rel=0.01
    )  # bfloat16 has 8 bits: 0.4 % a product, less in a mean
    assert losses[0] != losses[1]
    newest = list_checkpoints(run / "checkpoints")[-1]
    weights = load_file(newest / "trainable.safetensors")
    optimizer = torch.load(newest / "optimizer.pt", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    moments = [state[name] for state in optimizer["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    assert {tensor.dtype for tensor in moments} == {torch.float32}
    train(tiny_recipe(tmp_path / "again", text))  # another precision in the same process
    assert_equal_weights(tmp_path / "again", whole)
