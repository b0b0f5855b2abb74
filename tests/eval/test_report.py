from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from eval.plots import INK
from eval.report import exits_table, strategy_table, write_report
from eval.results import Difference, Report, TrainingPoint
from layerskip_model.errors import UserError
from tests.eval.samples import BASELINE, EXITS, TRAINING, failed, prompt, report, strategy

DRAFTS = {"accepted_lengths": [2], "drafted": 2, "accepted": 1, "proposals_at": [1, 1], "accepted_at": [1, 0]}


def written(report: Report, directory: Path) -> tuple[str, str, str]:
    write_report(report, directory)
    names = ["report.html", "report.json", "report.md", "table.txt"]
    assert sorted(path.name for path in directory.iterdir()) == names
    return contents(directory)


def contents(directory: Path) -> tuple[str, str, str]:
    json, markdown, html = (
        (directory / f"report.{kind}").read_text(encoding="utf-8") for kind in ("json", "md", "html")
    )
    return json, markdown, html


def printed(table: Any, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_failed_prompts_on_either_side_leave_the_ratio(tmp_path: Path) -> None:
    baseline = [*BASELINE[:3], failed(3)]
    found = strategy([failed(0), prompt(1, 10, 1.0), prompt(2, 10, 1.0), prompt(3, 10, 50.0)], baseline)
    assert found.speedup_pooled is not None
    assert found.speedup_pooled.value == pytest.approx(2.0)
    assert (found.failed, found.left_out) == (1, 2)
    _, markdown, html = written(report(found), tmp_path)
    assert "Draft: 1 of 4 prompts failed." in markdown
    assert "out of &lt;memory> \\| [x]" in markdown
    assert "out of &lt;memory&gt; | [x]" in html


def test_everything_failed(tmp_path: Path) -> None:
    found = strategy([failed(0), failed(1)])
    assert found.tokens_per_second is None
    assert found.speedup_median is None
    written(report(found), tmp_path)
    lonely = Report(**{**report().model_dump(), "strategies": [found], "baseline": None})
    written(lonely, tmp_path)


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    difference = Difference(position=3, expected=5, got=None, gap=1e-7, verdict="tie")
    prompts = [prompt(0, 10, 1.0, tokens_equal=False, difference=difference, text="naïve \u2028 <|end|>")]
    full = report(
        strategy(prompts, settings={"tree": (1, 2), "p": 0.5}, predicted_speedup=1.5, verify_cost=1.1),
        exits=EXITS,
        training=[*TRAINING, TrainingPoint(step=3, loss=float("inf"), tokens=0)],
    )
    text, _, _ = written(full, tmp_path)
    assert Report.model_validate_json(text) == full
    with pytest.raises(ValidationError, match="extra"):
        Report.model_validate_json(text.replace('"verify_cost"', '"verify_price"'))
    with pytest.raises(ValidationError, match="middle"):
        Report.model_validate_json(text.replace('"low"', '"middle": 1, "low"', 1))


class Fetches(HTMLParser):
    """Collects whatever a browser would load for the page."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.references: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                if (value or "").startswith("#"):
                    self.references.add((value or "")[1:])
                else:
                    self.fetched.append(value or "")
        if tag in ("script", "link", "iframe", "img", "image", "object"):
            self.fetched.append(tag)


def test_html_fetches_nothing_and_follows_the_page_colours(tmp_path: Path) -> None:
    found = strategy([prompt(0, 10, 1.0, accepted_lengths=[2, 3], drafted=4)], lossless=False)
    _, _, html = written(report(found, exits=EXITS, training=TRAINING), tmp_path)
    page = Fetches()
    page.feed(html)
    assert page.fetched == []
    assert page.references
    assert page.references <= page.ids
    assert not re.search(r"url\((?!#)|@import", html)
    assert html.count("<svg") == html.count("<figure") == 4
    figures = html[html.index("<body>") :]
    assert INK not in figures
    assert "currentColor" in figures
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_html_escapes_what_others_wrote(tmp_path: Path) -> None:
    _, _, html = written(report(title="<script>alert(1)</script>"), tmp_path)
    assert "<script" not in html
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize("present", ["strategies", "exits", "training", "nothing"])
def test_sections_are_there_only_with_their_data(present: str, tmp_path: Path) -> None:
    empty: dict[str, Any] = {**report().model_dump(), "strategies": [], "baseline": None}
    data = {"strategies": report().strategies, "exits": EXITS, "training": TRAINING}
    extra = {} if present == "nothing" else {present: data[present]}
    _, markdown, html = written(Report(**{**empty, **extra}), tmp_path)
    expected = {"strategies": "Strategies", "exits": "Exits", "training": "Training"}
    for name, title in expected.items():
        assert (f"## {title}\n" in markdown) == (name == present)
        assert (f"<h2>{title}</h2>" in html) == (name == present)
    for absent in ("Failed prompts", "Outputs that differ", "Acceptance at"):
        assert absent not in markdown


def test_only_one_strategy(tmp_path: Path) -> None:
    _, markdown, html = written(report(), tmp_path)
    assert "| Autoregressive (baseline) | 5.0 | - | - |" in markdown
    assert html.count("<svg") == 1
    assert "Fastest" not in markdown


def test_not_lossless_is_said_everywhere(tmp_path: Path) -> None:
    difference = Difference(position=2, expected=1, got=4, gap=3.0, verdict="bug")
    drafts = {
        "accepted_lengths": [3],
        "drafted": 2,
        "accepted": 2,
        "proposals_at": [1, 1],
        "accepted_at": [1, 1],
    }
    prompts = [prompt(0, 10, 0.1, tokens_equal=False, difference=difference, **drafts), failed(1)]
    found = report(strategy(prompts, label="Typical", lossless=False))
    _, markdown, _ = written(found, tmp_path)
    mentions = [line for line in markdown.splitlines() if "Typical" in line]
    assert len(mentions) == 6  # headline, strategies, positions, differences, failures, settings
    assert all("Typical (not lossless)" in line for line in mentions)
    assert "allowed (not lossless)" in markdown
    assert "a bug" not in markdown
    assert "Fastest" not in markdown
    assert "lossless)" in printed(strategy_table(found))


def test_differences_are_listed_worst_first_and_bugs_disqualify(tmp_path: Path) -> None:
    differences = [
        Difference(position=0, expected=1, got=2, gap=0.5, verdict="tie"),
        Difference(position=2, expected=1, got=None, gap=0.5, verdict="bug"),
    ]
    prompts = [prompt(i, 10, 0.1, tokens_equal=False, difference=d) for i, d in enumerate(differences)]
    wrong = strategy([*prompts, prompt(2, 10, 0.1, tokens_equal=True)], label="Wrong")
    right = strategy([prompt(0, 10, 1.0, tokens_equal=True)], label="Right", settings={"exit_layer": 4})
    _, markdown, _ = written(report(wrong, right), tmp_path)
    rows = [line for line in markdown.splitlines() if line.startswith("| Wrong") and "5.00e-01" in line]
    assert [row.split("|")[-2].strip() for row in rows] == ["bug", "tie"]
    assert "| Wrong | 1 | 2 | 1 | - | 5.00e-01 | bug |" in markdown
    assert "Wrong: 1 outputs differ from the baseline beyond rounding: a bug." in markdown
    assert "Fastest lossless strategy: Right, exit_layer=4: 2.00 times" in markdown


def test_many_differences_are_cut_and_counted(tmp_path: Path) -> None:
    tie = Difference(position=1, expected=1, got=2, gap=0.5, verdict="tie")
    prompts = [prompt(i, 10, 1.0, tokens_equal=False, difference=tie) for i in range(13)]
    _, markdown, _ = written(report(strategy(prompts)), tmp_path)
    assert sum(line.endswith("| tie |") for line in markdown.splitlines()) == 10
    assert "3 more are in report.json." in markdown


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_tables_never_cut_a_number(width: int) -> None:
    found = strategy(
        [prompt(i, 10, 1.0 + i / 10, tokens_equal=True, **DRAFTS) for i in range(4)],
        settings={"exit_layer": 4, "num_speculations": 6},
        predicted_speedup=1.75,
    )
    assert found.speedup_median is not None
    text = printed(strategy_table(report(found)), width)
    interval = f"[{found.speedup_median.low:.2f},{found.speedup_median.high:.2f}]"
    for expected in (interval, f"{found.speedup_median.value:.2f}x", "1.75", "2.00", "0.50", "4/4", "Draft"):
        assert expected in text
    assert "\u2026" not in text
    exits = printed(exits_table(EXITS), width)
    assert exits.index("3.500") < exits.index("3.000")  # layer 2, then layer 4


def test_an_unusable_output_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot make the output directory") as error:
        write_report(report(), tmp_path / "file")
    assert "\n" not in str(error.value)


def test_a_failure_in_rendering_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written(report(), tmp_path)

    def broken(*_: Any) -> str:
        raise RuntimeError

    monkeypatch.setattr("eval.report.to_svg", broken)
    with pytest.raises(RuntimeError):
        write_report(report(title="New"), tmp_path)
    assert contents(tmp_path) == before


def both_ways(**fields: Any) -> Report:
    """A report with greedy and sampled strategies."""
    counts = {"accepted_lengths": [2], "drafted": 2, "accepted": 1, "peak_bytes": 205_000_000}
    base = [one.model_copy(update={"peak_bytes": 200_000_000, "added_bytes": 4_100_000}) for one in BASELINE]
    settings = {"exit_layer": 4, "num_speculations": 6}
    greedy = [prompt(i, 10, 1.0, tokens_equal=True, added_bytes=5_500_000, **counts) for i in range(4)]
    drawn = [prompt(i, 10, 1.6 + i / 10, **{**counts, "accepted_lengths": [3]}) for i in range(4)]
    twin = {"name": "autoregressive", "label": "Autoregressive", "sampled": True}
    given: dict[str, Any] = {
        "sampled": [strategy(base, None, **twin), strategy(drawn, base, settings=settings, sampled=True)],
        "settings": {"sampling": {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}},
        **fields,
    }
    ours = strategy(greedy, base, settings=settings, predicted_speedup=1.75, weight_bytes=95_900_000)
    return report(ours, **given)


def test_the_sampled_speedup_stands_beside_the_greedy_one(tmp_path: Path) -> None:
    found = both_ways()
    _, markdown, html = written(found, tmp_path)
    sampled = found.sampled[1].speedup_median
    assert sampled is not None
    shown = f"{sampled.value:.2f}x [{sampled.low:.2f},{sampled.high:.2f}]"
    first, second = (line for line in markdown.splitlines() if line.startswith("| Draft") and "x [" in line)
    assert "| 2.00x [2.00,2.00] | 2.00x [2.00,2.00] | 1.75 | 2.00 | " + shown + " | 3.00 |" in first
    assert "(sampled)" in second
    assert second.count(shown) == 1
    assert second.split("|")[8].strip() == "-"  # identical outputs
    assert "## Strategies, sampled at temperature 0.7\n" in markdown
    assert "drawn from exactly the distribution" in markdown
    assert "Fastest lossless strategy, sampled at temperature 0.7: Draft (sampled)" in markdown
    assert html.count("<h2>Strategies") == 2


def test_both_speedups_fit_the_terminal(tmp_path: Path) -> None:
    found = both_ways()
    text = printed(strategy_table(found), 80)
    assert "Strategies, greedy and sampled at temperature 0.7" in text
    header = text[: text.index("Autoregressive")]
    for title in ("Speedup", "Sampled", "dicted", "Equal"):
        assert title in header
    for spared in ("Prefill", "Tri-"):
        assert spared not in header
    for whole in ("2.00x", "1.14x", "3.00", "4/4", "1.75", "num_speculations=6"):
        assert whole in text
    write_report(found, tmp_path)
    lines = (tmp_path / "table.txt").read_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert "Prefill" in printed(
        strategy_table(report(found.strategies[1])), 80
    )  # there is room without the twins


def test_only_sampled(tmp_path: Path) -> None:
    found = Report(**{**both_ways().model_dump(), "strategies": []})
    _, markdown, _ = written(found, tmp_path)
    assert "## Strategies\n" not in markdown
    assert "## Strategies, sampled at temperature 0.7\n" in markdown
    text = printed(strategy_table(found), 80)
    assert "Strategies, sampled at temperature 0.7" in text
    assert "Draft (sampled)" in text


def test_memory_has_a_table_of_its_own_where_it_was_measured(tmp_path: Path) -> None:
    _, markdown, _ = written(both_ways(), tmp_path)
    section = markdown[markdown.index("## Memory") : markdown.index("## Settings")]
    assert "| Draft, exit_layer=4, num_speculations=6 | 205.0 | 5.5 | 1.014 |" in section
    assert "| Autoregressive (sampled) (baseline) | 200.0 | 4.1 | - |" in section
    assert "## Memory" not in written(report(), tmp_path)[1]


def test_a_strategy_that_could_not_take_part_is_named(tmp_path: Path) -> None:
    found = report(skipped={"hf_early_exit": "it wants one prompt at a time"})
    _, markdown, _ = written(found, tmp_path)
    assert "- hf_early_exit is left out: it wants one prompt at a time." in markdown
    assert "hf_early_exit is left out" in printed(strategy_table(found))
