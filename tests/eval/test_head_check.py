"""A head that is told the wrong things is refused when it is loaded: every usual mistake, planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval import head_check
from eval.decoding.drafters.eagle import HeadLayer
from eval.draft_heads import load_eagle_draft
from eval.head_reading import HeadReader
from eval.target import Target
from layerskip_model.backbone import Backbone
from layerskip_model.eagle import EagleHead
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.eagle3_model import Eagle3Model
from layerskip_model.eagle_model import EagleModel
from layerskip_model.errors import UserError
from layerskip_model.formats.eagle import write_eagle
from layerskip_model.formats.record import RECORD_FILE, Record, write_record
from layerskip_model.head_probe import take_probe
from layerskip_model.reduced_vocabulary import ReducedVocabulary
from layerskip_model.rope import Rope
from layerskip_model.runner import Runner
from tests.layerskip_model.test_eagle_format import LLAMA3
from tests.layerskip_model.test_rope import OWN
from tests.layerskip_model.tiny_eagle import half_of
from tests.tiny_models import tiny_model

READS = (1, 3, 5)
REFUSED = "do not say here what they said when they were exported"


def six_layers(kind: str = "llama", **changes: Any) -> PreTrainedModel:
    return tiny_model(kind, num_hidden_layers=6, dtype=torch.float32, **changes)


def rounded(dtype: torch.dtype) -> PreTrainedModel:
    model = six_layers()
    nn.Module.to(model, dtype)
    return model


def target_of(model: PreTrainedModel) -> Target:
    nothing: Any = None
    return Target("tiny", model, nothing, Runner(model))


def slightly_moved(head: nn.Module) -> Any:
    """Not what it began with, and tame enough for half precision."""
    generator = torch.Generator().manual_seed(3)
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return head


def written(
    directory: Path,
    model: PreTrainedModel,
    kind: str,
    vocabulary: ReducedVocabulary | None = None,
    *,
    rope: dict[str, Any] | None = None,
) -> Path:
    """A head as training exports it, probe and all."""
    backbone = Backbone(model)
    module: Any
    if kind == "eagle":
        module = EagleModel(model, slightly_moved(EagleHead(backbone)))
    else:
        whole = ReducedVocabulary.whole(64)
        module = Eagle3Model(model, slightly_moved(Eagle3Head(backbone, vocabulary or whole, READS)))
    if rope is not None:
        module.head.layer.rope = Rope(backbone, rope)
    directory.mkdir()
    write_eagle(
        directory,
        module.head,
        module.head.state_dict(),
        dtype=torch.float32,
        backbone=backbone,
        base="tiny",
        base_fingerprint="0" * 64,
    )
    write_record(directory, Record(probe=take_probe(module, torch.float32)))
    return directory


@pytest.fixture(params=["eagle", "eagle3"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def refusal(model: PreTrainedModel, directory: Path) -> str:
    with pytest.raises(UserError) as refused:
        load_eagle_draft(target_of(model), str(directory))
    line = str(refused.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_head_that_is_told_what_it_was_trained_on_loads(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    directory = written(tmp_path / "head", six_layers(), kind)
    load_eagle_draft(target_of(rounded(dtype)), str(directory))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen3", "olmo2"])
def test_whatever_the_backbone(tmp_path: Path, family: str, kind: str) -> None:
    directory = written(tmp_path / "head", six_layers(family), kind)
    load_eagle_draft(target_of(six_layers(family)), str(directory))


@pytest.mark.parametrize("reads", [(2, 3, 5), (1, 2, 5), (1, 4, 5), (1, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_layer_is_named(tmp_path: Path, reads: tuple[int, ...], dtype: torch.dtype) -> None:
    directory = written(tmp_path / "head", six_layers(), "eagle3")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    assert config["feature_layers"] == list(READS)
    path.write_text(json.dumps(config | {"feature_layers": reads}))
    line = refusal(rounded(dtype), directory)
    assert REFUSED in line
    assert "with the feature layers [1, 3, 5] by" in line


def shifted(by: int) -> Callable[[HeadLayer, dict[int, Tensor]], Tensor]:
    before = HeadLayer.features

    def features(layer: HeadLayer, states: dict[int, Tensor]) -> Tensor:
        return before(layer, states).roll(by, dims=1)

    return features


@pytest.mark.parametrize(("by", "undone"), [(1, "one place later"), (-1, "one place before")])
def test_shifted_features_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, by: int, undone: str
) -> None:
    directory = written(tmp_path / "head", six_layers(), kind)
    monkeypatch.setattr(HeadLayer, "features", shifted(by))
    line = refusal(six_layers(), directory)
    assert REFUSED in line
    assert f"with features from {undone} by" in line


def test_features_before_the_norm_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = written(tmp_path / "head", six_layers(), "eagle")
    monkeypatch.setattr(HeadLayer, "features", lambda layer, states: states[5])
    assert REFUSED in refusal(six_layers(), directory)


def test_a_head_that_somebody_trained_on_states_before_the_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(EagleModel, "entering", unnormed)
        directory = written(tmp_path / "head", six_layers(), "eagle")
    assert "with features from before the final norm by" in refusal(six_layers(), directory)


def unnormed(module: EagleModel, tokens: Tensor) -> Tensor:
    found: list[Tensor] = []
    hook = module.backbone.layers[-1].register_forward_hook(lambda _, args, output: found.append(output))
    try:
        module.backbone.final_states(tokens)
    finally:
        hook.remove()
    return found[0]


def say_rope(directory: Path, **words: Any) -> None:
    """Edit what config.json says of RoPE."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: config[key] for key in config if "rope" not in key} | words))


@pytest.mark.parametrize("times", [0.01, 10.0, 100.0])
def test_another_rope_base_of_the_model(tmp_path: Path, kind: str, times: float) -> None:
    """Whether the head has its own, as config.json says, or that of the model."""
    directory = written(tmp_path / "head", six_layers(), kind)
    other = six_layers(rope_parameters={"rope_type": "default", "rope_theta": 10000.0 * times})
    for words in ({"rope_theta": 10000.0}, {"rope_theta": 10000.0 * times}):
        say_rope(directory, **words)
        line = refusal(other, directory)
        assert REFUSED in line
        assert f"with the model's RoPE base times {1.0 / times:g} by" in line


@pytest.mark.parametrize("times", [0.01, 10.0, 100.0])
def test_an_edited_rope_base_of_the_head(tmp_path: Path, kind: str, times: float) -> None:
    directory = written(tmp_path / "head", six_layers(), kind)
    say_rope(directory, rope_theta=10000.0 * times)
    line = refusal(six_layers(), directory)
    assert REFUSED in line
    assert "with the model's RoPE in the head by" in line


def test_rope_of_the_heads_own(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained with it: it loads, rounded or not, and with any other it does not."""
    directory = written(tmp_path / "head", six_layers(), kind, rope=OWN["default"])
    for dtype in (torch.float32, torch.bfloat16):
        load_eagle_draft(target_of(rounded(dtype)), str(directory))
    assert capsys.readouterr().err == ""  # its probe tells that it is right
    for base, undone in (
        (7700.0, "the head's RoPE base times 0.01"),
        (770.0, "the head's RoPE base times 0.1"),
    ):
        say_rope(directory, rope_theta=base)
        line = refusal(six_layers(), directory)
        assert REFUSED in line
        assert f"with {undone} by" in line
    say_rope(directory)
    assert REFUSED in refusal(six_layers(), directory)


def test_a_head_trained_with_the_default_that_says_otherwise(tmp_path: Path, kind: str) -> None:
    """As of programs that never look at the base in their configuration."""
    scaled = six_layers(rope_parameters=dict(LLAMA3))
    plain = {"rope_theta": 10000.0, "rope_type": "default"}
    directory = written(tmp_path / "head", scaled, kind, rope=plain)
    say_rope(directory)
    load_eagle_draft(target_of(scaled), str(directory))
    say_rope(directory, rope_parameters=LLAMA3)
    assert "with RoPE of base 10000 in the head by" in refusal(scaled, directory)


def test_other_rope_without_a_probe_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once in a program; a head that turns as its model does says nothing."""
    directory = written(tmp_path / "head", six_layers(), "eagle3")
    (directory / RECORD_FILE).unlink()
    load_eagle_draft(target_of(six_layers()), str(directory))
    assert capsys.readouterr().err == ""
    say_rope(directory, rope_theta=5e5)
    for _ in range(2):
        load_eagle_draft(target_of(six_layers()), str(directory))
    assert capsys.readouterr().err == (
        f"heads '{directory}' turn positions as their config.json says (base 500000, rope_type default), not as the "
        "model does (base 10000, rope_type default), and no probe tells whether they were trained so; if not, correct "
        "config.json\n"
    )


def test_another_vocabulary_of_the_same_size(tmp_path: Path) -> None:
    """Tables that fit each other, and are not those of the head."""
    directory = written(tmp_path / "head", six_layers(), "eagle3", half_of())
    counts = torch.zeros(64)
    counts[: half_of().size] = 1
    counts[0], counts[63] = 0, 1
    written(
        tmp_path / "other", six_layers(), "eagle3", ReducedVocabulary.most_frequent(counts, half_of().size)
    )
    load_eagle_draft(target_of(six_layers()), str(directory))
    (tmp_path / "other" / RECORD_FILE).write_text((directory / RECORD_FILE).read_text())
    assert REFUSED in refusal(six_layers(), tmp_path / "other")


def test_another_model_of_the_same_sizes(tmp_path: Path, kind: str) -> None:
    """A little further trained: nothing of its sizes tells."""
    directory = written(tmp_path / "head", six_layers(), kind)
    model = six_layers()
    generator = torch.Generator().manual_seed(8)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    assert REFUSED in refusal(model, directory)
    tokens = six_layers(vocab_size=48)
    with pytest.raises(UserError, match="another"):
        load_eagle_draft(target_of(tokens), str(directory))


def test_without_a_probe_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = written(tmp_path / "head", six_layers(), "eagle")
    monkeypatch.setattr(HeadLayer, "features", shifted(1))
    (directory / RECORD_FILE).unlink()
    load_eagle_draft(target_of(six_layers()), str(directory))


def test_a_right_head_costs_one_pass_of_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision mistakes are tried, of the same states."""
    directory = written(tmp_path / "head", six_layers(), "eagle3")
    passes: list[int] = []
    before = Runner.run_reading
    inside = head_check.compare

    def counted(runner: Runner, hidden: Tensor, *rest: Any) -> Any:
        passes.append(hidden.shape[1])
        return before(runner, hidden, *rest)

    def watched(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "run_reading", counted)
            return inside(*args)

    monkeypatch.setattr(head_check, "compare", watched)
    load_eagle_draft(target_of(six_layers().bfloat16()), str(directory))
    assert passes == [64]


@pytest.mark.parametrize("own", [None, Rope(Backbone(six_layers()), OWN["linear"])])
def test_all_rope_is_back_afterwards(tmp_path: Path, own: Rope | None) -> None:
    directory = written(tmp_path / "head", six_layers(), "eagle")
    target = target_of(six_layers())
    draft = load_eagle_draft(target, str(directory))
    draft.heads.layer.rope = own
    rotary = target.runner.backbone.base.rotary_emb
    reader = HeadReader(draft, target.runner)
    tokens = torch.arange(9)
    for reading in reader.mistakes():
        assert len(list(reader.choices(reading, tokens, 2))) == 2
        assert target.runner.backbone.base.rotary_emb is rotary
        assert draft.heads.layer.rope is own
