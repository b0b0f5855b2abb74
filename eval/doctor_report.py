"""What `python -m eval doctor` prints, and doctor.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from eval.doctor import Examination
from eval.report import write_whole

STYLES = {"ok": "green", "wrong": "bold red", "unknown": "yellow"}


def examination_tables(examination: Examination) -> list[Table | Text]:
    """All checks, and below them what is said of those that failed."""
    title = f"{examination.draft} ({examination.kind}) for {examination.model}"
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=0)
    for column in ("Check", "", "Found", "Expected"):
        table.add_column(column, overflow="fold")
    for one in examination.findings:
        verdict = Text(one.verdict, style=STYLES[one.verdict])
        table.add_row(Text(one.check), verdict, Text(one.found), Text(one.expected))
    causes = [Text(f"{one.check}: {one.cause}") for one in examination.findings if one.cause]
    return [table, *causes]


def verdict(examination: Examination) -> str:
    """The end of it, in one line."""
    counts = {name: sum(one.verdict == name for one in examination.findings) for name in STYLES}
    if not examination.is_sound:
        return f"doctor: {counts['wrong']} of {len(examination.findings)} checks found something wrong"
    missing = f", {counts['unknown']} unknown" if counts["unknown"] else ""
    return f"doctor: nothing wrong found ({counts['ok']} ok{missing})"


def save_examination(examination: Examination, place: Path) -> Path:
    """Write doctor.json."""
    path = place / "doctor.json"
    write_whole(path, json.dumps(asdict(examination) | {"sound": examination.is_sound}, indent=1) + "\n")
    return path
