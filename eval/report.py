"""Writes an evaluation down: report.json for programs, report.md and report.html for people, and tables."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment as Templates
from jinja2 import PackageLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from eval.columns import (
    ANSWER_COLUMNS,
    EXIT_COLUMNS,
    PROFILE_COLUMNS,
    RIVAL_COLUMNS,
    Column,
    how_sampled,
    rival_rows,
    strategy_columns,
    strategy_rows,
)
from eval.plots import plot_exits, to_svg
from eval.results import Answers, ExitQuality, Report
from eval.sections import headline, sections
from layerskip_model.errors import UserError

__all__ = ["answers_table", "exits_table", "plot_exits", "strategy_table", "tables", "write_report"]

TABLE_WIDTH = 80  # of table.txt
SETTING_WIDTH = 18  # the most that a setting takes in it without a break: num_speculations=9


def write_report(report: Report, output_dir: Path) -> None:
    """Writes report.json, report.md, report.html and table.txt into `output_dir`, made where missing.

    The HTML needs no other file and no network. Everything is rendered before anything is written, and each
    file appears whole or not at all. Raises UserError where `output_dir` cannot be a directory.
    """
    files = {
        "report.json": json.dumps(report.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n",
        "report.md": _render("report.md.j2", report),
        "table.txt": "".join(_plain_text(part) for part in tables(report)),
        "report.html": _render("report.html.j2", report),
    }
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the output directory {output_dir} ({error.strerror}): name another"
        ) from error
    for name, text in files.items():
        write_whole(output_dir / name, text)


def tables(report: Report) -> list[Table | Text]:
    """What the terminal shows of a report, with an empty line between two tables."""
    found = [strategy_table(report)]
    if report.rivals:
        found.append(fitting_table("Over transformers' own", RIVAL_COLUMNS, rival_rows(report)))
    if report.profile:
        found.append(profile_table(report))
    return [part for table in found for part in (Text(), table)][1:]


def strategy_table(report: Report) -> Table:
    """The strategies for the terminal, the report's own columns; what must not be missed is the caption.

    Those that were only sampled, or else the greedy ones with what became of them when sampled.
    """
    ways = ["greedy"] if report.strategies else []
    ways += [f"sampled {how_sampled(report)}"] if report.sampled else []
    rows = strategy_rows(report, report.strategies or report.sampled)
    table = fitting_table(f"Strategies, {' and '.join(ways)}", strategy_columns(report), rows)
    table.caption = Text("\n".join(headline(report)), justify="left")
    return table


def profile_table(report: Report) -> Table:
    """Where the strategies' steps go, for the terminal."""
    return fitting_table("Milliseconds a step", PROFILE_COLUMNS, report.profile)


def exits_table(exits: Sequence[ExitQuality]) -> Table:
    """The quality of every exit for the terminal, shallowest first."""
    return fitting_table("Exits", EXIT_COLUMNS, sorted(exits, key=lambda e: e.layer))


def answers_table(answers: Sequence[Answers]) -> Table:
    """How often each way of decoding is right, for the terminal."""
    return fitting_table("Answers", ANSWER_COLUMNS, answers)


def fitting_table(title: str, columns: Sequence[Column], rows: Sequence[Any]) -> Table:
    """A table of TABLE_WIDTH, without the columns that can be spared as far as it needs their room."""
    shown = [column for column in columns if column.short != ""]
    console = Console(width=TABLE_WIDTH)
    while True:
        table = _rich_table(title, shown, rows)
        needed = Measurement.get(console, console.options.update(max_width=10 * TABLE_WIDTH), table).minimum
        least = max(shown, key=lambda column: column.spare)
        if needed <= TABLE_WIDTH or least.spare == 0:
            return table
        shown.remove(least)


def _rich_table(title: str, columns: Sequence[Column], rows: Sequence[Any]) -> Table:
    """Only the first column gives way on a narrow terminal, so that no number is ever cut."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column(columns[0].title, overflow="fold", min_width=10)
    for column in columns[1:]:
        table.add_column(column.short or column.title, justify="right", no_wrap=True)
    for row in rows:
        first, *numbers = (column.cell(row) for column in columns)
        # Text: a "[" is no markup. An interval goes below its value, and what is said of it below that.
        cells = (Text(cell.replace(" [", "\n[").replace(" (not ", "\n(not\n")) for cell in numbers)
        table.add_row(_below_each_other(first), *cells)
    return table


def _below_each_other(title: str) -> Text:
    """A strategy's settings below it, a long value below its name."""
    name, *settings = title.split(", ")
    lines = [one if len(one) <= SETTING_WIDTH else one.replace("=", "=\n  ", 1) for one in settings]
    return Text("\n ".join([name, *lines]))


def _plain_text(part: Table | Text) -> str:
    console = Console(width=TABLE_WIDTH, file=io.StringIO(), record=True)
    console.print(part)
    return "".join(f"{line.rstrip()}\n" for line in console.export_text().splitlines())


def _render(template: str, report: Report) -> str:
    templates = Templates(
        loader=PackageLoader("eval"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["svg"] = to_svg
    templates.filters["markdown"] = _markdown
    return templates.get_template(template).render(
        report=report, headline=headline(report), sections=sections(report)
    )


def _markdown(text: str) -> str:
    """Text that stands for itself in a Markdown table cell."""
    for special in ("\\", "|", "*", "`"):
        text = text.replace(special, "\\" + special)
    return " ".join(text.replace("](", "]\\(").replace("<", "&lt;").split())


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
