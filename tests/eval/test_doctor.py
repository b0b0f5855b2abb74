"""`python -m eval doctor`: what it finds of sound heads, and of heads with every kind of mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.decoding.drafters.eagle import HeadLayer
from eval.decoding.speculate import decode
from eval.decoding.strategies import make_drafter
from eval.doctor import STEPS
from eval.draft_heads import load_eagle_draft
from eval.head_acceptance import acceptance_length, hits_of_eagle, shares
from eval.head_reading import HeadReader, Reading
from eval.target import load_target
from eval.tree_ranks import MISSING, Text
from layerskip_model.formats.record import RECORD_FILE, read_record, write_record
from tests.eval.conftest import Answer, trained

RECIPE = """
output_dir: {run}
max_steps: 30
batch: {{sequences: 8, length: 32}}
model: {{name_or_path: {base}}}
data:
  train: [{{kind: text, files: ["{texts}/train-*.txt"]}}]
  heldout: [{{kind: text, files: ["{texts}/heldout-*.txt"]}}]
objective: {{kind: eagle3, steps: 3, feature_layers: [1, 2, 3]}}
optimizer: {{kind: adamw, lr: 0.01}}
log: {{every: 6}}
"""
FEW = ["--num_samples", "4", "--max_steps", "24"]
Answers = Callable[..., Answer]


@pytest.fixture(scope="module")
def eagle_run(finished_run: Path) -> Path:
    """A real, short training of an EAGLE-3 head."""
    texts = finished_run.parent
    trained(
        texts / "eagle3.yaml", RECIPE.format(run=texts / "eagle3", base=finished_run / "export", texts=texts)
    )
    return texts / "eagle3"


@pytest.fixture
def head(eagle_run: Path, tmp_path: Path) -> Path:
    """A copy of the head."""
    return shutil.copytree(eagle_run / "export", tmp_path / "head")


@pytest.fixture
def flags(finished_run: Path, head: Path) -> list[str]:
    return ["doctor", "--model", str(finished_run / "export"), "--draft", str(head), *FEW]


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in changes}
    content |= {key: value for key, value in changes.items() if value is not None}
    path.write_text(json.dumps(content))


def without_probe(head: Path) -> None:
    """Leave only the acceptance in what was recorded."""
    write_record(head, replace(read_record(head), probe=None))


def found(place: Path) -> dict[str, dict[str, str]]:
    """The findings of doctor.json by their checks."""
    return {one["check"]: one for one in json.loads((place / "doctor.json").read_text())["findings"]}


def test_what_training_leaves_is_sound(answer: Answers, eagle_run: Path, tmp_path: Path) -> None:
    status, out, _ = answer("doctor", "--run", str(eagle_run), *FEW, "--output_dir", str(tmp_path))
    assert status == 0
    assert "nothing wrong found (9 ok)" in out
    findings = found(tmp_path)
    assert {one["verdict"] for one in findings.values()} == {"ok"}
    run = json.loads((eagle_run / "run.json").read_text())
    recorded = run["heldout_metrics"]["acceptance_length"]
    assert findings["acceptance length"]["expected"] == f"{recorded:.2f} in training"
    agreement = [run["heldout_metrics"][f"step_{step}/agreement"] for step in (1, 2, 3)]
    assert findings["right in each step"]["expected"] == " ".join(f"{share:.0%}" for share in agreement)
    assert json.loads((tmp_path / "doctor.json").read_text())["sound"] is True


def test_the_program(finished_run: Path, head: Path) -> None:
    """Its exit status where something is wrong."""
    rewrite(head / "config.json", base_fingerprint="0" * 64)
    flags = ["--model", str(finished_run / "export"), "--draft", str(head), *FEW]
    result = subprocess.run([sys.executable, "-m", "eval", "doctor", *flags], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "")
    assert "1 of 9 checks found something wrong" in result.stdout


def test_other_weights(answer: Answers, flags: list[str], head: Path, tmp_path: Path) -> None:
    rewrite(head / "config.json", base_fingerprint="0" * 64)
    status, out, _ = answer(*flags, "--output_dir", str(tmp_path))
    assert status == 1
    assert "with other weights than this" in " ".join(out.split())
    findings = found(tmp_path)
    assert [name for name, one in findings.items() if one["verdict"] == "wrong"] == ["weights of the model"]


def test_another_rope(answer: Answers, flags: list[str], head: Path, tmp_path: Path) -> None:
    config = json.loads((head / "config.json").read_text())
    rope = {key: None for key in config if "rope" in key} | {"rope_theta": 1e6}
    rewrite(head / "config.json", **rope)
    status, out, _ = answer(*flags, "--output_dir", str(tmp_path))
    assert status == 1
    finding = found(tmp_path)["RoPE"]
    assert (finding["verdict"], finding["found"], finding["expected"]) == (
        "unknown",
        "base 1e+06, rope_type default",
        "base 10000, rope_type default in the model",
    )
    assert "RoPE: the head's is not the model's, which is right if it was trained so" in " ".join(out.split())
    probe = found(tmp_path)["probe"]
    assert probe["verdict"] == "wrong"
    assert "with the model's RoPE in the head by" in probe["cause"]
    rewrite(head / "config.json", rope_theta="much")
    status, _, _ = answer(*flags, "--output_dir", str(tmp_path))
    assert status == 1
    said = "RoPE of base 'much', rope_type default in config.json has no tables"
    assert said in found(tmp_path)["shapes"]["cause"]


def test_wrong_sizes(answer: Answers, flags: list[str], head: Path, tmp_path: Path) -> None:
    weights = load_file(head / "model.safetensors")
    save_file(weights | {"norm.weight": torch.ones(16)}, head / "model.safetensors")
    status, _, _ = answer(*flags, "--output_dir", str(tmp_path))
    assert status == 1
    finding = found(tmp_path)["shapes"]
    assert finding["verdict"] == "wrong"
    assert "norm.weight is [16]" in finding["cause"]
    assert "acceptance length" not in found(tmp_path)


def test_shifted_features_are_named_by_the_probe(
    answer: Answers, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = HeadLayer.features
    monkeypatch.setattr(HeadLayer, "features", lambda layer, states: before(layer, states).roll(1, dims=1))
    status, _, _ = answer(*flags, "--output_dir", str(tmp_path))
    assert status == 1
    finding = found(tmp_path)["probe"]
    assert finding["verdict"] == "wrong"
    assert "with features from one place later by" in finding["cause"]


@pytest.mark.parametrize("steps", [3, None])
def test_the_models_own_text_names_a_mistake(
    answer: Answers,
    flags: list[str],
    head: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int | None,
) -> None:
    """A head without a probe that only guesses right when its features are from one place later."""

    def choices(reader: HeadReader, reading: Reading, tokens: Tensor, steps: int) -> Iterator[Tensor]:
        for step in range(steps):
            yield tokens[step + 2 :] if reading.shift == 1 else tokens[step + 2 :] + 1

    monkeypatch.setattr(HeadReader, "choices", choices)
    if steps is None:
        (head / RECORD_FILE).unlink()
    else:
        without_probe(head)
    status, _, _ = answer(*flags, "--output_dir", str(tmp_path))
    assert status == 1
    finding = found(tmp_path)["acceptance length"]
    best = 1.0 + (steps or STEPS)
    assert (finding["verdict"], finding["found"]) == ("wrong", "1.00")
    assert finding["cause"] == f"with features from one place later it would be {best:.2f} where it is 1.00"


@pytest.mark.parametrize(
    ("probe", "samples", "verdict", "said"),
    [
        (False, "4", "wrong", "than when they were trained"),
        (
            False,
            "3",
            "unknown",
            "but only 3 of the prompts could be used, which tells little; give 4 or more",
        ),
        (True, "4", "unknown", "on text that they find harder: the probe is right"),
    ],
)
def test_far_fewer_drafts_than_recorded(
    answer: Answers,
    flags: list[str],
    head: Path,
    tmp_path: Path,
    probe: bool,
    samples: str,
    verdict: str,
    said: str,
) -> None:
    """Where no mistake explains it: wrong, unless the texts are too few or the probe is right."""
    if not probe:
        without_probe(head)
    rewrite(head / RECORD_FILE, acceptance_length=9.5)
    status, _, _ = answer(*flags, "--num_samples", samples, "--output_dir", str(tmp_path))
    finding = found(tmp_path)["acceptance length"]
    assert (status, finding["verdict"]) == (1 if verdict == "wrong" else 0, verdict)
    assert finding["cause"].startswith("far fewer drafts would be accepted than when they were trained")
    assert finding["cause"].endswith(said)


def test_what_is_not_known_is_not_wrong(
    answer: Answers, flags: list[str], head: Path, tmp_path: Path
) -> None:
    """A head of others: no fingerprint, no record, and no RoPE, which is the usual one then."""
    config = json.loads((head / "config.json").read_text())
    rewrite(head / "config.json", **{key: None for key in config if "rope" in key}, base_fingerprint=None)
    (head / RECORD_FILE).unlink()
    status, out, _ = answer(*flags, "--output_dir", str(tmp_path))
    assert status == 0
    unknown = [name for name, one in found(tmp_path).items() if one["verdict"] == "unknown"]
    assert unknown == ["weights of the model", "probe", "right in each step", "acceptance length"]
    assert "nothing wrong found (5 ok, 4 unknown)" in out
    assert found(tmp_path)["RoPE"]["found"] == "base 10000, rope_type default (none is named)"


def test_without_prompts_acceptance_is_not_known(
    answer: Answers, finished_run: Path, eagle_run: Path, head: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(finished_run / "export", tmp_path / "base")
    status, out, _ = answer("doctor", "--model", str(base), "--draft", str(head))
    assert status == 0
    assert "give --dataset" in " ".join(out.split())
    rows = str(eagle_run / "heldout.jsonl")
    status, out, _ = answer("doctor", "--model", str(base), "--draft", str(head), "--dataset", rows, *FEW)
    assert status == 0
    assert "9 ok" in out


def test_medusa_heads(answer: Answers, heads_run: Path, finished_run: Path, tmp_path: Path) -> None:
    status, out, _ = answer("doctor", "--run", str(heads_run), *FEW)
    assert status == 0
    assert "nothing wrong found (5 ok)" in out
    record = read_record(heads_run / "export")
    assert record.probe is None
    assert len(record.agreement) == 3
    copy = shutil.copytree(heads_run / "export", tmp_path / "heads")
    rewrite(copy / "config.json", base_fingerprint="0" * 64)
    rewrite(copy / RECORD_FILE, acceptance_length=9.5)
    flags = ["--model", str(finished_run / "export"), "--draft", str(copy), *FEW]
    status, _, error = answer("doctor", *flags, "--output_dir", str(tmp_path))
    assert (status, error) == (1, "")
    wrong = [name for name, one in found(tmp_path).items() if one["verdict"] == "wrong"]
    assert wrong == ["weights of the model", "acceptance length"]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--draft", "{base}"], "has no Medusa, Hydra or EAGLE heads"),
        (["--draft", "{base}/nowhere"], "has no Medusa, Hydra or EAGLE heads"),
        ([], "comes with no heads"),
        (["--draft", "{head}", "--num_samples", "0"], "--num_samples 0"),
        (["--draft", "{head}", "--max_steps", "1"], "--max_steps 1"),
        (["--draft", "{head}", "--dataset", "none.jsonl"], "none.jsonl"),
    ],
)
def test_mistakes_of_the_users(
    answer: Answers, finished_run: Path, head: Path, extra: list[str], said: str
) -> None:
    base = str(finished_run / "export")
    given = [flag.format(base=base, head=head) for flag in extra]
    status, _, error = answer("doctor", "--model", base, *given)
    assert status == 2
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_acceptance_is_of_the_places_that_all_steps_have() -> None:
    assert (
        acceptance_length([torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, MISSING]])]) == 1.0 + 4 / 3
    )
    assert acceptance_length([torch.full((2, 3), MISSING)]) is None
    assert shares([torch.tensor([[1, 0], [1, MISSING], [0, 1]])]) == [pytest.approx(2 / 3), 0.5]


def test_a_place_of_the_text_is_one_that_drafting_starts_from(finished_run: Path, eagle_run: Path) -> None:
    """What the teacher-forced chain foretells at the first place is what the first step of decoding accepts."""
    target = load_target(run=str(finished_run), dtype="float64")
    draft = load_eagle_draft(target, str(eagle_run))
    reader = HeadReader(draft, target.runner)
    for prompt in ("def anna_0(value):\n", "    return", "bert", "\n\nchlo"):
        tokens = target.encode(prompt)
        (plain,) = decode(
            target.runner,
            make_drafter("autoregressive", target.runner),
            [tokens],
            max_new_tokens=9,
            eos_token_ids=[],
        )
        text = Text(tokens + plain.tokens, len(tokens))
        drafter = make_drafter("eagle3", target.runner, draft=draft, num_speculations=3, tree_top_k=1)
        (drafted,) = decode(target.runner, drafter, [tokens], max_new_tokens=9, eos_token_ids=[])
        foretold = 1 + int(hits_of_eagle(reader, 3, reader.right, text)[0].cumprod(0).sum())
        assert drafted.accepted_lengths[0] == foretold
