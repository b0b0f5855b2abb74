"""DDP, FSDP2 and DeepSpeed's ZeRO on two gloo processes do what one process does, and go on where they stopped."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from layerskip_model.layer_dropout import LayerDropout
from tests.train.engine_runs import ENVIRONMENTS
from tests.train.tiny_runs import (
    ROOT,
    assert_close_logs,
    assert_close_weights,
    assert_equal_weights,
    exported,
    log_lines,
    recipe_values,
    start,
    write_recipe,
    write_text,
)
from train import UserError, parse_recipe, train
from train.checkpoint import list_checkpoints
from train.engine import new_accelerator

ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]
# One row a rank and rates up to .9: ranks keep different layers, and some layers nobody keeps.
DROPOUT: dict[str, Any] = {"p_max": 0.9, "over_depth": "linear"}
RUN: dict[str, Any] = {
    "max_steps": 10,
    "batch": {"sequences": 2, "length": 16},
    "objective": {
        "kind": "layerskip",
        "layer_dropout": DROPOUT,
        "early_exit": {"curriculum": "rotational", "every": 2},
    },
}
ACCUMULATED = {"sequences": 4, "length": 16, "micro": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stopped": {},
    "recomputed": {"batch": ACCUMULATED, "model": {"activation_checkpointing": True}},
    "lora": {"max_steps": 4, "model": {"lora": {"rank": 4}}},
    "bfloat16": {"batch": ACCUMULATED, "model": {"autocast": "bfloat16"}},
}


ALONE = {"recomputed": "one_accumulated", "lora": "one_lora"}  # else "one": the same run on one process


def launch_engines(processes: int, *arguments: str) -> subprocess.Popen[str]:
    """Start `engine_runs ARGUMENTS` on so many gloo processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    command = (*launcher, "-m", "tests.train.engine_runs", *arguments)
    return start(*command, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every variant under every engine (VARIANT_ENGINE), all of one launch, and on one process here."""
    folder = tmp_path_factory.mktemp("engines")
    text = write_text(folder)
    # A model with tied embeddings on disk: each engine loads it in its own way.
    base = recipe_values(folder / "base", text, **RUN | {"max_steps": 1})
    base["model"]["config"]["tie_word_embeddings"] = True
    train(parse_recipe(base))
    model = {"name_or_path": str(folder / "base" / "export"), "autocast": "float32"}
    values = {
        name: recipe_values(
            folder / name, text, **RUN | changes | {"model": model | changes.get("model", {})}
        )
        for name, changes in VARIANTS.items()
    }
    paths = [str(write_recipe(folder / f"{name}.yaml", recipe)) for name, recipe in values.items()]
    launched = launch_engines(2, *ENGINES, "--", *paths)
    try:
        train(parse_recipe(values["plain"] | {"output_dir": str(folder / "one")}))
        train(parse_recipe(values["lora"] | {"output_dir": str(folder / "one_lora")}))
        whole = {"output_dir": str(folder / "one_accumulated"), "batch": {"sequences": 4, "length": 16}}
        train(parse_recipe(values["plain"] | whole))
        _, error = launched.communicate(timeout=600)  # a collective that does not match hangs
    finally:
        launched.kill()
    assert launched.returncode == 0, error[-4000:]
    return folder


def test_the_runs_drop_what_they_should() -> None:
    """Steps at which the two ranks keep different layers, and at which neither keeps some layer."""
    dropout = LayerDropout(
        **DROPOUT, over_time="constant", layers="all", num_layers=4, total_steps=10, seed=0
    )
    kept = [dropout.kept(step, [0, 1]) for step in range(10)]
    assert any((rows[:, 0] != rows[:, 1]).any() for rows in kept)
    assert sum((~rows.any(axis=1)).any() for rows in kept) >= 5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", ["plain", "stopped", "recomputed", "lora"])
def test_every_engine_learns_what_one_process_learns(variant: str, engine: str, runs: Path) -> None:
    """Losses, gradient norms, held-out metrics and the export; `stopped` was stopped after five steps."""
    one = runs / ALONE.get(variant, "one")
    assert_close_logs(runs / f"{variant}_{engine}", one)
    assert_close_weights(runs / f"{variant}_{engine}", one)


@pytest.mark.parametrize("engine", ENGINES)
def test_stopped_equals_never_stopped(engine: str, runs: Path) -> None:
    """Bit for bit: shards of weights and optimizer state lose nothing."""
    assert_equal_weights(runs / f"stopped_{engine}", runs / f"plain_{engine}")
    assert log_lines(runs / f"stopped_{engine}") == log_lines(runs / f"plain_{engine}")
    saved = list_checkpoints(runs / f"stopped_{engine}" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000005", "step-00000010"]


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_has_float32_masters(engine: str, runs: Path) -> None:
    """The exported weights are no bfloat16 numbers, and near those of the float32 run."""
    ours, theirs = exported(runs / f"bfloat16_{engine}"), exported(runs / "one_accumulated")
    for name, weight in ours.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=5e-3)
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in ours.values())
    losses = [
        [line["loss"] for line in log_lines(runs / run) if "loss" in line]
        for run in (f"bfloat16_{engine}", "one_accumulated")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.slow
def test_fsdp2_goes_on_with_another_number_of_processes(runs: Path) -> None:
    left = runs / "resumed_fsdp2"
    done = shutil.ignore_patterns("run.json", "export", "step-00000010")
    shutil.copytree(runs / "stopped_fsdp2", left, ignore=done)
    values = yaml.safe_load((runs / "plain.yaml").read_text()) | {"output_dir": str(runs / "resumed")}
    path = write_recipe(runs / "resumed.yaml", values)
    launched = launch_engines(1, "fsdp2", "--", str(path))
    _, error = launched.communicate(timeout=120)
    assert launched.returncode == 0, error[-4000:]
    assert "going on after step 5" in error
    assert_close_logs(left, runs / "one")
    assert_close_weights(left, runs / "one")


@pytest.mark.slow
def test_the_optimizer_on_the_cpu_does_the_same(runs: Path) -> None:
    launched = launch_engines(
        2, "offload", "--", *(str(runs / f"{name}.yaml") for name in ("plain", "stopped"))
    )
    _, error = launched.communicate(timeout=120)
    assert launched.returncode == 0, error[-4000:]
    assert_close_logs(runs / "plain_offload", runs / "one")
    assert_close_weights(runs / "plain_offload", runs / "one")
    assert_equal_weights(runs / "stopped_offload", runs / "plain_offload")


def test_another_engine_does_not_read_a_checkpoint(runs: Path) -> None:
    values = recipe_values(runs / "stopped_zero3", runs, **RUN)
    values["model"] = {"name_or_path": str(runs / "base" / "export"), "autocast": "float32"}
    (runs / "stopped_zero3" / "run.json").unlink()
    with pytest.raises(
        UserError, match=r"written by engine 'deepspeed' on 2 process.* this is 'whole' on 1"
    ) as told:
        train(parse_recipe(values))
    assert "\n" not in str(told.value)


def launch_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, str]]:
    """What `accelerate launch --config_file PATH` would start: the kind of launcher, and its environment."""
    seen: dict[str, Any] = {}
    for name in ("deepspeed_launcher", "multi_gpu_launcher", "simple_launcher"):
        monkeypatch.setattr(launch, name, lambda args, name=name: seen.update(launcher=name, args=args))
    launch.launch_command(
        launch.launch_command_parser().parse_args(["--config_file", str(path), "-m", "train", "x"])
    )
    if seen["launcher"] == "simple_launcher":
        return "simple_launcher", {}
    if seen["launcher"] == "deepspeed_launcher":
        return seen["launcher"], prepare_deepspeed_cmd_env(seen["args"])[1]
    return seen["launcher"], prepare_multi_gpu_env(seen["args"])


EXPECTED: dict[str, tuple[str, dict[str, str]]] = {
    "single": ("simple_launcher", {}),
    "ddp": ("multi_gpu_launcher", {}),
    "fsdp2": ("multi_gpu_launcher", ENVIRONMENTS["fsdp2"]),
    "two-nodes": ("multi_gpu_launcher", ENVIRONMENTS["fsdp2"]),
    "zero2": ("deepspeed_launcher", ENVIRONMENTS["zero2"]),
    "zero2-offload": ("deepspeed_launcher", {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}),
    "zero3": (
        "deepspeed_launcher",
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
    ),
}


def test_every_configuration_is_expected() -> None:
    assert {path.stem for path in (ROOT / "recipes" / "accelerate").iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_its_configurations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They launch the engine that their name says, and leave precision, batch and clipping to the recipe."""
    path = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    launcher, environment = launch_environment(path, monkeypatch)
    assert launcher == EXPECTED[name][0]
    assert EXPECTED[name][1].items() <= environment.items()
    config: Any = load_config_from_file(str(path))
    assert config.mixed_precision in (None, "no")
    assert not {"gradient_accumulation_steps", "gradient_clipping"} & (config.deepspeed_config or {}).keys()
    assert (
        f"recipes/accelerate/{name}.yaml" in path.read_text() + (ROOT / "docs" / "launching.md").read_text()
    )


def test_fsdps_first_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="fsdp_version: 1 is not supported here; set fsdp_version: 2"):
        new_accelerator(parse_recipe(recipe_values(Path("out"), "text")), 2)


def test_a_missing_deepspeed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("train.processes.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        train(parse_recipe(recipe_values(tmp_path / "run", "text")))
    assert not (tmp_path / "run").exists()
