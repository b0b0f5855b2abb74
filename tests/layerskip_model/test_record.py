"""recorded.json: what was known of heads, whole, missing or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerskip_model.errors import UserError
from layerskip_model.formats.record import RECORD_FILE, Record, read_record, write_record
from layerskip_model.head_probe import Probe

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
