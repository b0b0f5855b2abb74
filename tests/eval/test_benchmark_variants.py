"""Several variants of one strategy in one table, draft models, what is not lossless, and rivals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval import Request, run_benchmark, write_report
from eval.results import Report
from eval.sections import headline
from eval.target import Target
from layerskip_model.errors import UserError
from tests.eval.benchmarks import by_name, dataset, spy_on

PROMPTS = ["def anna_1(value):\n", "def bert", "    return", "def anna_2(value):\n    return value"]
VARIANTS = [
    "self_speculative",
    "self_speculative:draft_stop=confidence",
    "self_speculative:draft_tree:tree_top_k=2",
    "prompt_lookup:num_speculations=3",
    "lookahead",
    "speculative_sampling:num_speculations=2",
    "hf_generate",
    "hf_early_exit",
    "hf_assisted:num_speculations=2",
    "hf_prompt_lookup:num_speculations=3",
]
OURS = ["autoregressive", *VARIANTS[:6]]
CHAINS = {"self_speculative", "self_speculative:draft_stop=confidence", *VARIANTS[3:6:2]}


@pytest.fixture(scope="module")
def small_model(tiny_target: Target) -> str:
    """A draft model: the target itself, which agrees."""
    return tiny_target.name


@pytest.fixture(scope="module")
def out(finished_run: Path, small_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole program on all of them at once."""
    place = tmp_path_factory.mktemp("variants")
    flags = ["--draft", small_model, "--exit_layer", "1", "--num_speculations", "2", "--max_steps", "12"]
    command = [sys.executable, "-m", "eval", "benchmark", "--run", str(finished_run), "--num_samples", "3"]
    command += [*flags, "--strategies", ", ".join(VARIANTS), "--dtype", "float64", "--profile"]
    result = subprocess.run([*command, "--output_dir", str(place)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == ""
    return place


@pytest.fixture(scope="module")
def report(out: Path) -> Report:
    return Report.model_validate_json((out / "report.json").read_text())


def test_every_variant_is_measured_and_says_the_same(report: Report) -> None:
    for strategies in (report.strategies, report.sampled):
        assert [s.name for s in strategies] == ["autoregressive", *VARIANTS]
        assert [s.strategy for s in strategies] == [s.name.split(":")[0] for s in strategies]
        assert all(s.failed == 0 and s.lossless for s in strategies)
    assert all(s.equal == s.compared == 3 for s in report.strategies[1:])
    for s in report.sampled:  # whose drafts are not drawn draws as the baseline does
        same = s.name.startswith(("prompt_lookup", "lookahead", "self_speculative:draft_tree"))
        assert (s.equal, s.compared) == ((3, 3) if same else (0, 0)), s.name


def test_each_row_has_its_own_settings(report: Report, small_model: str) -> None:
    found = by_name(report)
    both = {"exit_layer": 1, "num_speculations": 2}
    assert found["self_speculative"].settings == found["hf_early_exit"].settings == both
    tree = found["self_speculative:draft_tree:tree_top_k=2"]
    assert tree.settings.items() >= {**both, "draft_tree": True, "tree_top_k": 2}.items()
    assert tree.variant == ["draft_tree", "tree_top_k"]
    assert found["prompt_lookup:num_speculations=3"].settings == {"max_ngram": 3, "num_speculations": 3}
    drafting = {"draft": small_model, "num_speculations": 2}
    assert found["speculative_sampling:num_speculations=2"].settings == drafting
    assert found["hf_assisted:num_speculations=2"].settings == drafting


def test_rates_are_for_chains_and_predictions_for_plain_ones(report: Report) -> None:
    for strategies in (report.strategies, report.sampled):
        for s in strategies:
            drafted = any(prompt.drafted for prompt in s.prompts)
            assert (s.acceptance_rate is not None) == (drafted and s.name in CHAINS), s.name
            assert bool(s.acceptance_at) == (drafted and s.name in CHAINS), s.name
            assert (s.acceptance_length is not None) == (s.name in OURS), s.name
            assert (s.predicted_speedup is not None) == (s.name == "self_speculative"), s.name


def test_ours_stand_beside_the_peers_that_do_the_same(report: Report) -> None:
    pairs = [
        ("autoregressive", "hf_generate"),
        ("self_speculative", "hf_early_exit"),
        ("speculative_sampling:num_speculations=2", "hf_assisted:num_speculations=2"),
        ("prompt_lookup:num_speculations=3", "hf_prompt_lookup:num_speculations=3"),
    ]
    assert [(one.ours, one.peer) for one in report.rivals if not one.sampled] == pairs
    assert [(one.ours, one.peer) for one in report.rivals if one.sampled] == pairs


def test_every_step_has_its_profile(report: Report) -> None:
    assert [(row.name, row.sampled) for row in report.profile] == [
        (name, sampled) for sampled in (False, True) for name in OURS
    ]
    drafting = {row.name for row in report.profile if row.phases["draft forwards"] > 0}
    assert drafting == {*VARIANTS[:3], "speculative_sampling:num_speculations=2"}


def test_the_tables_tell_variants_apart(out: Path) -> None:
    table = (out / "table.txt").read_text()
    assert max(map(len, table.splitlines())) <= 80
    for text in ("draft_tree", "tree_top_k=2", "draft_stop=\n   confidence", "Over transformers' own"):
        assert text in table
    markdown = (out / "report.md").read_text()
    assert "| self speculative, exit_layer=1, num_speculations=2, draft_tree, tree_top_k=2" in markdown
    assert "speculative sampling, draft=export, num_speculations=2 |" in markdown
    section = markdown[markdown.index("## Over transformers' own") :]
    assert "| prompt lookup, max_ngram=3, num_speculations=3 | transformers prompt lookup |" in section
    html = (out / "report.html").read_text()
    assert "draft_tree" in html[html.index("<svg") :]


def test_what_is_typical_is_marked_and_never_the_fastest_lossless_one(
    tiny_target: Target, tmp_path: Path
) -> None:
    path = dataset(tmp_path, PROMPTS)
    given: dict[str, Any] = {"settings": {"max_ngram": 2}, "max_steps": 10, "dataset": path}
    names = ["prompt_lookup", "hf_prompt_lookup"]
    found = run_benchmark(tiny_target, Request(names, **given, acceptance="typical"))
    assert [s.lossless for s in found.strategies] == [True, True, True]
    assert [s.lossless for s in found.sampled] == [True, False, True]
    assert [(one.ours, one.sampled) for one in found.rivals] == [("prompt_lookup", False)]
    assert found.settings["sampling"]["acceptance"] == "typical"  # type: ignore[index, call-overload]
    write_report(found, tmp_path / "out")
    markdown = (tmp_path / "out" / "report.md").read_text()
    rows = [line for line in markdown.splitlines() if "prompt lookup (sampled)" in line]
    ours = [line for line in rows if "transformers" not in line]
    assert ours
    assert all("prompt lookup (sampled) (not lossless)" in line for line in ours)
    section = markdown[markdown.index("## Strategies\n") : markdown.index("## Strategies, sampled")]
    (row,) = (line for line in section.splitlines() if line.startswith("| prompt lookup,"))
    assert row.count("(not lossless)") == 1  # its sampled speedup
    fastest = [line for line in markdown.splitlines() if "Fastest lossless strategy, sampled" in line]
    assert all("prompt lookup (sampled) (" not in line for line in fastest)
    assert "typical acceptance" in (tmp_path / "out" / "table.txt").read_text()


def test_a_sampled_output_that_differs_is_found(
    tiny_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupt(name: str, generation: Any) -> Any:
        if name == "prompt_lookup":
            generation.tokens[3] = (generation.tokens[3] + 1) % 256
        return generation

    spy_on(monkeypatch, lambda name, prompt: None, corrupt)
    names = ["prompt_lookup", "prompt_lookup:max_ngram=1"]
    found = run_benchmark(
        tiny_target, Request(names, dataset=dataset(tmp_path, PROMPTS[:2]), max_steps=6, sample=True)
    )
    wrong, right = found.sampled[1:]
    assert (wrong.equal, wrong.compared, right.equal, right.compared) == (0, 2, 2, 2)
    assert [p.difference and p.difference.verdict for p in wrong.prompts] == ["bug", "bug"]
    lines = headline(found)
    assert "prompt lookup (sampled): 2 outputs differ from the baseline beyond rounding: a bug." in lines


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["prompt_lookup", "prompt_lookup"], "'prompt_lookup' and 'prompt_lookup' are the same"),
        (["greedy", "autoregressive"], "'autoregressive' and 'autoregressive' are the same"),
        (
            ["prompt_lookup", "prompt_lookup:max_ngram=3"],
            "'prompt_lookup' and 'prompt_lookup:max_ngram=3' are",
        ),
        (["speculative_sampling"], "speculative_sampling needs draft"),
        (["hf_assisted"], "hf_assisted needs draft"),
        (["prompt_lookup:max_ngram=0"], "prompt_lookup: max_ngram=0 is not valid"),
        (["speculative_sampling:draft=/no/where"], "/no/where"),
    ],
)
def test_entries_that_cannot_be_measured_are_refused(
    tiny_target: Target, tmp_path: Path, names: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        run_benchmark(tiny_target, Request(names, dataset=dataset(tmp_path, PROMPTS), max_steps=4))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_batches_of_every_variant(tiny_target: Target, small_model: str, tmp_path: Path) -> None:
    settings = {"exit_layer": 1, "num_speculations": 2, "draft": small_model}
    request = Request(
        VARIANTS, settings, dataset=dataset(tmp_path, PROMPTS), max_steps=8, batch_size=2, sample=False
    )
    found = run_benchmark(tiny_target, request)
    assert [s.name for s in found.strategies] == [*OURS, "hf_generate"]
    assert all(s.equal == s.compared == 4 for s in found.strategies[1:])
    assert list(found.skipped) == VARIANTS[-3:]
    assert [(one.ours, one.peer) for one in found.rivals] == [("autoregressive", "hf_generate")]
