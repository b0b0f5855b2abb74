"""Draft models: loaded like the target, of its vocabulary, once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eval.decoding.capture import GraphRunner
from eval.draft_model import DraftModel, check_vocabulary, load_draft
from eval.drafts import with_loaded_drafts
from eval.generate import Generator
from eval.target import Target, load_target
from layerskip_model.errors import UserError
from tests.eval.decoding.drafts import first_layers
from tests.eval.tiny_tokenizers import TOKENIZERS, byte_level


@pytest.fixture(scope="session")
def draft_directory(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first half of the run's model as a checkpoint, its logits two tokens wider."""
    target = load_target(run=str(finished_run))
    place = tmp_path_factory.mktemp("drafting") / "half"
    first_layers(target.model, 2, vocabulary=target.runner.vocab_size + 2).save_pretrained(place)
    target.tokenizer.save_pretrained(place)
    return place


def test_it_is_loaded_like_the_target(draft_directory: Path, tiny_target: Target) -> None:
    draft = load_draft(tiny_target, str(draft_directory))
    assert (draft.name, draft.runner.num_layers) == (str(draft_directory), 2)
    assert (draft.runner.dtype, draft.runner.device) == (tiny_target.runner.dtype, tiny_target.runner.device)
    assert draft.runner.vocab_size == tiny_target.runner.vocab_size + 2


def test_it_is_loaded_once_and_captured_where_the_target_is(
    draft_directory: Path, tiny_target: Target
) -> None:
    settings = {"draft": str(draft_directory), "num_speculations": 3}
    first, again = (with_loaded_drafts(tiny_target, "speculative_sampling", settings) for _ in range(2))
    draft = first["draft"]
    assert isinstance(draft, DraftModel)
    assert first == again == {**settings, "draft": draft}
    assert with_loaded_drafts(tiny_target, "speculative_sampling", first) == first
    assert with_loaded_drafts(tiny_target, "speculative_sampling", {"num_speculations": 3}) == {
        "num_speculations": 3
    }
    captured = with_loaded_drafts(
        replace(tiny_target, runner=GraphRunner(tiny_target.runner)), "speculative_sampling", settings
    )
    assert captured["draft"].runner.fixed_shapes
    assert captured["draft"].runner.model is draft.runner.model


def test_another_vocabulary_is_refused_before_the_weights_are_read(
    tiny_target: Target, tmp_path: Path
) -> None:
    tiny_target.model.config.save_pretrained(tmp_path)  # without weights
    TOKENIZERS["fallback"].save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"--draft: model '.*' has another vocabulary: token \d+ is '.*' there and"
    ):
        load_draft(tiny_target, str(tmp_path))


@pytest.mark.parametrize(
    ("theirs", "ours", "reason"),
    [
        ("bytes", "words", "token 0 is '!' there and '[UNK]' in the target"),
        ("words", "bytes", "a draft model needs the target's tokenizer"),
    ],
)
def test_the_first_other_token_is_named(theirs: str, ours: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        check_vocabulary("small", TOKENIZERS[theirs], TOKENIZERS[ours])
    assert reason in str(caught.value)
    assert f"({len(TOKENIZERS[theirs])} and {len(TOKENIZERS[ours])} tokens)" in str(caught.value)


def test_added_tokens_may_be_missing_but_not_differ() -> None:
    plain, padded, other = byte_level(), byte_level(), byte_level()
    padded.add_special_tokens({"pad_token": "<pad>"})
    other.add_special_tokens({"pad_token": "<nothing>"})
    check_vocabulary("small", plain, padded)
    check_vocabulary("small", padded, plain)
    with pytest.raises(UserError, match="'<pad>' there and '<nothing>' in the target"):
        check_vocabulary("small", padded, other)


def test_a_model_that_is_not_there_is_named(tiny_target: Target, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--draft: model '.*nowhere': no such directory"):
        load_draft(tiny_target, str(tmp_path / "nowhere"))


def generated(run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eval", "generate", "--run", str(run), "--dtype", "float64", *flags]
    command += ["--generation_strategy", "speculative_sampling", "--prompt", "def bert", "--max_steps", "12"]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_whole_program_drafts_with_it(
    finished_run: Path, draft_directory: Path, tiny_target: Target
) -> None:
    done = generated(finished_run, "--draft", str(draft_directory), "--num_speculations", "2")
    assert done.returncode == 0, done.stderr
    plain = Generator.make(tiny_target, max_new_tokens=12)
    expected = plain.text(plain.generate(["def bert"])[0], "def bert")
    assert expected.strip() in done.stdout
    assert "acceptance rate" in done.stderr


def test_the_whole_program_says_what_is_missing(finished_run: Path) -> None:
    done = generated(finished_run)
    assert done.returncode == 2
    assert "speculative_sampling needs draft: the directory or hub name of a smaller model" in done.stderr
    assert "Traceback" not in done.stderr
