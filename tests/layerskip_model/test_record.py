"""recorded.json: what was known of heads, whole, missing or damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerskip_model.errors import UserError
from layerskip_model.formats.eagle_export import FORMS, export_eagle
from layerskip_model.formats.eagle_import import import_eagle
from layerskip_model.formats.record import RECORD_FILE, Record, carry_record, read_record, write_record
from layerskip_model.head_probe import Probe
from tests.layerskip_model.test_eagle_format import saved, write
from tests.layerskip_model.tiny_eagle import some_head

PROBE = Probe([4, 5, 6, 7], [[-1.5, -0.25], [-2.0]], "bfloat16")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    record = Record(2.5, (0.75, 0.5), PROBE)
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    write_record(tmp_path, Record())
    assert read_record(tmp_path) == Record()


def test_heads_of_others_have_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) == Record()
    assert read_record(tmp_path / "nowhere") == Record()


def test_a_copy_has_what_its_heads_had(tmp_path: Path) -> None:
    """A probe in bfloat16 allows a copy of as much, and one in float32 no longer as little of a copy in float16."""
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    carry_record(there, here, torch.float32)
    assert not list(here.iterdir())
    for of_probe, of_copy, noted in [
        ("bfloat16", torch.float32, "bfloat16"),
        ("bfloat16", torch.float16, "bfloat16"),
        ("float32", torch.float16, "float16"),
        ("float32", torch.float32, "float32"),
    ]:
        record = Record(2.5, (0.75, 0.5), replace(PROBE, dtype=of_probe))
        write_record(there, record)
        carry_record(there, here, of_copy)
        assert read_record(here) == replace(record, probe=replace(PROBE, dtype=noted))
    write_record(there, Record(2.5))
    carry_record(there, here, torch.bfloat16)
    assert read_record(here) == Record(2.5)


@pytest.mark.parametrize("form", FORMS)
def test_an_eagle_head_keeps_it_in_every_form(form: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    source = write(tmp_path / "head", base, some_head("eagle3", base))
    record = Record(2.5, (0.75, 0.5), replace(PROBE, dtype="float32"))
    write_record(source, record)
    theirs, again = tmp_path / "theirs", tmp_path / "again"
    theirs.mkdir()
    again.mkdir()
    export_eagle(str(source), form, theirs, "bfloat16")
    assert read_record(theirs) == replace(record, probe=PROBE)
    import_eagle(str(theirs), str(base.name_or_path), again)
    assert read_record(again) == replace(record, probe=PROBE)


def test_it_is_made_of_the_last_metrics() -> None:
    heldout = {"loss": 1.0, "acceptance_length": 2.5, "lm/top1": 0.5}
    steps = {f"step_{step}/agreement": 1.0 / step for step in (10, 2, 1)}
    assert Record.of(heldout | steps, None) == Record(2.5, (1.0, 0.5, 0.1))
    assert Record.of(heldout | {"head_1/agreement": 0.25}, None).agreement == (0.25,)
    assert Record.of({}, PROBE) == Record(None, (), PROBE)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-20],
        lambda whole: "[]",
        lambda whole: whole.replace("-2.0", "NaN"),
        lambda whole: whole.replace(", -0.25", ""),
        lambda whole: whole.replace('"agreement"', '"other"'),
        lambda whole: whole.replace("[-2.0]", "3"),
        lambda whole: whole.replace("bfloat16", "float8"),
        lambda whole: whole.replace(", [-2.0]]", "]"),
    ],
)
def test_a_damaged_one_is_refused(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    write_record(tmp_path, Record(2.5, (0.75,), PROBE))
    path = tmp_path / RECORD_FILE
    json.loads(path.read_text())
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=r"recorded\.json is damaged"):
        read_record(tmp_path)
