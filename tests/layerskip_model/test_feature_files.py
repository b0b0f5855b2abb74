"""States on disk: whatever was listed comes back, bit for bit; what is damaged, or made from other things, does not."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerskip_model.errors import UserError
from layerskip_model.formats.features import FeatureFiles

MADE_FROM: dict[str, Any] = {"model": "a/model", "fingerprint": "12", "width": 3, "dtype": "bfloat16"}


def states(rows: list[int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Of each row something that only it has, [n, 2, 3]."""
    return torch.stack([torch.arange(6).view(2, 3) + 10.0 * row for row in rows]).to(dtype)


def filled(directory: Path, *shards: list[int], **changes: Any) -> FeatureFiles:
    files = FeatureFiles(directory)
    with files.alone():
        assert files.claim(MADE_FROM | changes, {"torch": "2"}) == []
        for name, rows in zip(files.next_names(len(shards)), shards, strict=True):
            files.write(name, rows, states(rows))
            files.enlist([name])
    return files


def test_rows_come_back(tmp_path: Path) -> None:
    files = filled(tmp_path / "made" / "on the way", [3, 1], [7])
    places = FeatureFiles(files.directory).places()
    assert places.keys() == {1, 3, 7}
    for row, place in places.items():
        assert torch.equal(files.read(place), states([row])[0])
    told = json.loads((files.directory / "manifest.json").read_text())
    assert told["made_from"] == MADE_FROM
    assert [shard["rows"] for shard in told["shards"].values()] == [2, 1]
    sizes = {name: (files.directory / name).stat().st_size for name in told["shards"]}
    assert {name: shard["bytes"] for name, shard in told["shards"].items()} == sizes


def read_in_another_process(directory: str, row: int, answers: Any) -> None:
    files = FeatureFiles(Path(directory))
    answers.put(files.read(files.places()[row]).tolist())


def test_another_process_reads_too(tmp_path: Path) -> None:
    files = filled(tmp_path, [4, 5])
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=read_in_another_process, args=(str(tmp_path), 5, answers))
    process.start()
    assert answers.get(timeout=60) == files.read(files.places()[5]).tolist() == states([5])[0].tolist()
    process.join()


def test_more_is_added_later(tmp_path: Path) -> None:
    filled(tmp_path, [0], [1])
    files = filled(tmp_path, [2])
    assert files.places().keys() == {0, 1, 2}
    assert torch.equal(files.read(files.places()[0]), states([0])[0])


def test_a_shard_that_no_manifest_lists_does_not_count(tmp_path: Path) -> None:
    """As a killed run leaves it; the next one writes over it."""
    files = filled(tmp_path, [0])
    (name,) = files.next_names(1)
    files.write(name, [1], states([1]))
    (tmp_path / f".{name}.partial").write_bytes(b"half")
    assert files.places().keys() == {0}
    filled(tmp_path, [2])
    assert files.places().keys() == {0, 2}
    assert torch.equal(files.read(files.places()[2]), states([2])[0])


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "gone"])
def test_a_damaged_shard_is_found_and_the_others_kept(damage: str, tmp_path: Path) -> None:
    files = filled(tmp_path, [0, 1], [2])
    torn = tmp_path / "features-00000.safetensors"
    content = torn.read_bytes()
    if damage == "gone":
        torn.unlink()
    else:
        torn.write_bytes({"cut": content[:-1], "longer": content + b"0", "empty": b""}[damage])
    with files.alone():
        assert files.claim(MADE_FROM, {}) == [torn.name]
        assert files.places().keys() == {2}
        assert not torn.exists()
        assert files.claim(MADE_FROM, {}) == []


def test_a_shard_that_goes_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    files = filled(tmp_path, [0])
    place = files.places()[0]
    (tmp_path / place[0]).unlink()
    with pytest.raises(UserError, match=r"features-00000.safetensors is gone or damaged .* run again"):
        files.read(place)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"fingerprint": "34", "model": "b/model"},
            r"made by 'a/model' with other weights than 'b/model' has now",
        ),
        ({"width": 4}, r"width: 3 there, 4 here"),
        ({"dtype": "float32"}, r"dtype: bfloat16 there, float32 here"),
        ({"added": 1}, r"added: None there, 1 here"),
    ],
)
def test_what_was_made_from_something_else_is_refused(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    files = filled(tmp_path, [0])
    before = (tmp_path / "manifest.json").read_bytes()
    with files.alone(), pytest.raises(UserError, match=rf"^features\.cache: .*{expected}.*; name another"):
        files.claim(MADE_FROM | changes, {})
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_the_same_model_by_another_name_is_the_same(tmp_path: Path) -> None:
    filled(tmp_path, [0])
    assert filled(tmp_path, [1], model="moved/model").places().keys() == {0, 1}


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "made_from": 3, "shards": {}}']
)
def test_a_damaged_manifest_is_one_line(content: str, tmp_path: Path) -> None:
    files = filled(tmp_path, [0])
    (tmp_path / "manifest.json").write_text(content)
    with files.alone(), pytest.raises(UserError, match=r"manifest.json cannot be used .*; delete "):
        files.claim(MADE_FROM, {})


def test_one_at_a_time(tmp_path: Path) -> None:
    first, second = FeatureFiles(tmp_path), FeatureFiles(tmp_path)
    with (
        first.alone(),
        pytest.raises(UserError, match=r"another run fills .* now; wait for it"),
        second.alone(),
    ):
        pass
    with second.alone():
        pass


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    files = FeatureFiles(tmp_path / "file" / "train")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"), files.alone():
        pass


def test_a_full_disk_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = filled(tmp_path, [0])

    def save_file(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("layerskip_model.formats.features.save_file", save_file)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        files.write("features-00001.safetensors", [1], states([1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "features-00000.safetensors",
        "manifest.json",
    ]
