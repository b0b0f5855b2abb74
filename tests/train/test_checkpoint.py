from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerskip_model.errors import UserError
from tests.tiny_models import tiny_model
from tests.train.small_recipe import small_recipe
from train import checkpoint as module
from train.checkpoint import list_checkpoints, load_checkpoint, replace_directory, save_checkpoint
from train.data.stream_rows import StreamState
from train.engine import Engine, new_accelerator, new_engine
from train.objectives import LayerSkip
from train.optimizer import build_optimizer
from train.optimizer_config import AdamWConfig

ADAMW = AdamWConfig(kind="adamw", lr=0.01)


def make(tied: bool = False, **changes: Any) -> Engine:
    model = tiny_model(dtype=torch.float32, num_hidden_layers=2, tie_word_embeddings=tied, **changes)
    objective = LayerSkip.build(small_recipe(), model)
    return new_engine(new_accelerator(small_recipe(), 1), objective, build_optimizer(ADAMW, objective))


def step(engine: Engine, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in engine.objective.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    engine.optimizer.step()


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine.objective.named_parameters()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("tied", [False, True])
def test_weights_optimizer_and_step_come_back(tmp_path: Path, tied: bool) -> None:
    engine = make(tied)
    step(engine, 1)
    path = save_checkpoint(tmp_path, 7, engine, keep=2)
    saved = weights(engine)
    step(engine, 2)
    after = weights(engine)

    fresh = make(tied)
    assert load_checkpoint(path, fresh).step == 7
    assert_same(weights(fresh), saved)
    step(fresh, 2)  # AdamW's averages and step count are there too
    assert_same(weights(fresh), after)
    model: Any = fresh.objective.module.model  # type: ignore[union-attr]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head" in str(load_file(path / "trainable.safetensors").keys())) != tied


def test_the_newest_are_kept(tmp_path: Path) -> None:
    engine = make()
    for number in (5, 90, 100, 1000):  # by number, not by name
        path = save_checkpoint(tmp_path, number, engine, keep=2)
        assert list_checkpoints(tmp_path)[-1] == path
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000100", "step-00001000"]
    assert len(list(tmp_path.iterdir())) == 2
    save_checkpoint(tmp_path, 1001, engine, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00001001"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    engine = make()
    save_checkpoint(tmp_path, 3, engine, keep=2)
    step(engine, 1)
    path = save_checkpoint(tmp_path, 3, engine, keep=2)
    fresh = make()
    load_checkpoint(path, fresh)
    assert_same(weights(fresh), weights(engine))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize(
    "victim",
    [
        "train.engine.save_file",
        "torch.save",
        "json.dumps",
        "train.checkpoint.replace_directory",
        "shutil.rmtree",
    ],
)
def test_a_kill_while_saving_leaves_an_older_one_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    engine = make()
    step(engine, 1)
    save_checkpoint(tmp_path, 1, engine, keep=1)
    old = weights(engine)
    step(engine, 2)
    new = weights(engine)

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if victim == "shutil.rmtree":  # while the old one is being removed, when the new one is there
            real = module.shutil.rmtree

            def half(path: Path, **options: Any) -> None:
                if Path(path).exists() and not options:
                    (Path(path) / "trainable.safetensors").unlink()
                    raise Killed
                real(path, **options)

            patch.setattr(module.shutil, "rmtree", half)
        else:
            patch.setattr(victim, killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 2, engine, keep=1)

    fresh = make()
    found = list_checkpoints(tmp_path)
    expected = {1: old, 2: new}[load_checkpoint(found[-1], fresh).step]
    assert_same(weights(fresh), expected)
    for path in found:  # nothing that cannot be loaded is listed
        load_checkpoint(path, fresh)
    save_checkpoint(tmp_path, 3, engine, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]  # what the kill left is gone


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, name: str, damage: bytes | None) -> None:
    engine = make()
    path = save_checkpoint(tmp_path, 1, engine, keep=2)
    if damage is None:
        (path / name).write_bytes((path / name).read_bytes()[:-20])
    else:
        (path / name).write_bytes(damage)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, engine)
    message = str(caught.value)
    assert message.startswith(f"checkpoint {path} cannot be resumed (")
    assert message.endswith("delete it to go on from the one before, or pass --fresh")
    assert "\n" not in message


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    engine = make()
    path = save_checkpoint(tmp_path, 1, engine, keep=2)
    for other in (make(intermediate_size=64), make(tied=True)):
        with pytest.raises(UserError, match="cannot be resumed"):
            load_checkpoint(path, other)


def test_listing_passes_over_what_is_unfinished_or_foreign(tmp_path: Path) -> None:
    engine = make()
    path = save_checkpoint(tmp_path, 1, engine, keep=2)
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert list_checkpoints(tmp_path) == [path]
    assert list_checkpoints(tmp_path / "missing") == []


def test_replacing_a_directory(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text(content)
        replace_directory(tmp_path / "new", tmp_path / "target")
        assert (tmp_path / "target" / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_where_streams_were_comes_back(tmp_path: Path) -> None:
    engine = make()
    stream: StreamState = {"documents": 12, "left": torch.arange(5), "place": "a.jsonl:7"}
    path = save_checkpoint(tmp_path, 3, engine, keep=1, metrics={"loss": [2.5, 4.0]}, stream=stream)
    saved = load_checkpoint(path, make())
    assert saved.step == 3
    assert saved.metrics == {"loss": [2.5, 4.0]}
    assert saved.stream is not None
    assert torch.equal(torch.as_tensor(saved.stream["left"]), torch.arange(5))
    assert {name: saved.stream[name] for name in ("documents", "place")} == {
        "documents": 12,
        "place": "a.jsonl:7",
    }
    assert load_checkpoint(save_checkpoint(tmp_path, 4, engine, keep=1), make()).stream is None


@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_state_is_the_modules(tied: bool) -> None:
    """Every name, in float32 on the CPU; tied names share one tensor, as they do in the module."""
    engine = make(tied)
    engine.objective.module.model.model.norm.to(torch.bfloat16)  # type: ignore[union-attr]
    state = engine.whole_state()
    assert state is not None
    expected = engine.objective.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].float())
    prefix = "module.model."
    names = (prefix + "lm_head.weight", prefix + "model.embed_tokens.weight")
    assert (state[names[0]] is state[names[1]]) == tied
