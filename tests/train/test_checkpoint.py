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
from train.objectives import LayerSkip, Objective
from train.optimizer import build_optimizer
from train.optimizer_config import AdamWConfig

ADAMW = AdamWConfig(kind="adamw", lr=0.01)


def make(tied: bool = False, **changes: Any) -> tuple[Objective[Any], torch.optim.Optimizer]:
    model = tiny_model(dtype=torch.float32, num_hidden_layers=2, tie_word_embeddings=tied, **changes)
    objective = LayerSkip.build(small_recipe(), model)
    return objective, build_optimizer(ADAMW, objective)


def step(objective: Objective[Any], optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in objective.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def weights(objective: Objective[Any]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("tied", [False, True])
def test_weights_optimizer_and_step_come_back(tmp_path: Path, tied: bool) -> None:
    objective, optimizer = make(tied)
    step(objective, optimizer, 1)
    path = save_checkpoint(tmp_path, 7, objective, optimizer, keep=2)
    saved = weights(objective)
    step(objective, optimizer, 2)
    after = weights(objective)

    fresh, fresh_optimizer = make(tied)
    assert load_checkpoint(path, fresh, fresh_optimizer) == 7
    assert_same(weights(fresh), saved)
    step(fresh, fresh_optimizer, 2)  # AdamW's averages and step count are there too
    assert_same(weights(fresh), after)
    model: Any = fresh.module.model  # type: ignore[union-attr]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head" in str(load_file(path / "trainable.safetensors").keys())) != tied


def test_the_newest_are_kept(tmp_path: Path) -> None:
    objective, optimizer = make()
    for number in (5, 90, 100, 1000):  # by number, not by name
        path = save_checkpoint(tmp_path, number, objective, optimizer, keep=2)
        assert list_checkpoints(tmp_path)[-1] == path
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000100", "step-00001000"]
    assert len(list(tmp_path.iterdir())) == 2
    save_checkpoint(tmp_path, 1001, objective, optimizer, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00001001"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    objective, optimizer = make()
    save_checkpoint(tmp_path, 3, objective, optimizer, keep=2)
    step(objective, optimizer, 1)
    path = save_checkpoint(tmp_path, 3, objective, optimizer, keep=2)
    fresh, fresh_optimizer = make()
    load_checkpoint(path, fresh, fresh_optimizer)
    assert_same(weights(fresh), weights(objective))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize(
    "victim", ["save_file", "torch.save", "json.dumps", "replace_directory", "shutil.rmtree"]
)
def test_a_kill_while_saving_leaves_an_older_one_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    objective, optimizer = make()
    step(objective, optimizer, 1)
    save_checkpoint(tmp_path, 1, objective, optimizer, keep=1)
    old = weights(objective)
    step(objective, optimizer, 2)
    new = weights(objective)

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
            owner, _, name = victim.rpartition(".")
            patch.setattr(getattr(module, owner) if owner else module, name, killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 2, objective, optimizer, keep=1)

    fresh, fresh_optimizer = make()
    found = list_checkpoints(tmp_path)
    expected = {1: old, 2: new}[load_checkpoint(found[-1], fresh, fresh_optimizer)]
    assert_same(weights(fresh), expected)
    for path in found:  # nothing that cannot be loaded is listed
        load_checkpoint(path, fresh, fresh_optimizer)
    save_checkpoint(tmp_path, 3, objective, optimizer, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]  # what the kill left is gone


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, name: str, damage: bytes | None) -> None:
    objective, optimizer = make()
    path = save_checkpoint(tmp_path, 1, objective, optimizer, keep=2)
    if damage is None:
        (path / name).write_bytes((path / name).read_bytes()[:-20])
    else:
        (path / name).write_bytes(damage)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, objective, optimizer)
    message = str(caught.value)
    assert message.startswith(f"checkpoint {path} cannot be resumed (")
    assert message.endswith("delete it to go on from the one before, or pass --fresh")
    assert "\n" not in message


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    objective, optimizer = make()
    path = save_checkpoint(tmp_path, 1, objective, optimizer, keep=2)
    for other, other_optimizer in (make(intermediate_size=64), make(tied=True)):
        with pytest.raises(UserError, match="cannot be resumed"):
            load_checkpoint(path, other, other_optimizer)


def test_listing_passes_over_what_is_unfinished_or_foreign(tmp_path: Path) -> None:
    objective, optimizer = make()
    path = save_checkpoint(tmp_path, 1, objective, optimizer, keep=2)
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
