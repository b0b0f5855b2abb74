"""What strategies are called: settings in words, marks, and what tells two variants apart."""

from __future__ import annotations

from typing import Any

from eval.titles import marked, setting_words, titled, value_text
from tests.eval.samples import prompt, strategy

SETTINGS: dict[str, Any] = {
    "exit_layer": 2,
    "draft_tree": True,
    "stop_threshold": 0.1 + 0.2,
    "draft": "/a/b/small",
}


def test_settings_in_words() -> None:
    assert setting_words(SETTINGS) == ["exit_layer=2", "draft_tree", "stop_threshold=0.3", "draft=small"]
    assert setting_words(SETTINGS, ["draft", "draft_tree"]) == ["draft_tree", "draft=small"]
    assert setting_words({"draft": "org/" + "x" * 40}) == [f"draft={'x' * 21}..."]
    assert [value_text(value) for value in (1e-7, 3, "text", {"a": None})] == [
        "1e-07",
        "3",
        "text",
        '{"a": null}',
    ]


def test_marks_and_variants() -> None:
    def named(**fields: Any) -> tuple[str, str]:
        found = strategy([prompt(0, 10, 1.0)], settings=SETTINGS, variant=["draft_tree"], **fields)
        return marked(found), titled(found)

    rest = "exit_layer=2, draft_tree, stop_threshold=0.3, draft=small"
    assert named() == ("Draft, draft_tree", f"Draft, {rest}")
    both = "Draft (sampled) (not lossless)"
    assert named(sampled=True, lossless=False) == (f"{both}, draft_tree", f"{both}, {rest}")
