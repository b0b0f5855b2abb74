"""What training leaves is used as the released LayerSkip checkpoints are, by transformers alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from layerskip_model.early_exit import EarlyExitModel, ExitLoss
from layerskip_model.layer_dropout import LayerDropout
from tests.tiny_models import tiny_model

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama after thirty steps on a text that repeats, so that its exits agree now and then."""
    model = tiny_model(dtype=torch.float32, eos_token_id=2)
    exit_loss = ExitLoss(4, 30, [1, 2, 3, 4], "linear", e_scale=1.0, curriculum="rotational", every=2)
    dropout = LayerDropout(0.3, "exp", "constant", "all", num_layers=4, total_steps=30, seed=0)
    module = EarlyExitModel(model, exit_loss, dropout).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    text = torch.arange(8 * 25).view(8, 25) * 7 % 61 + 3
    for step in range(30):
        loss = module(text[:, :-1], text[:, 1:], range(8), step).weighted_sum() / (8 * 24)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("export")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(exported: Path) -> PreTrainedModel:
    """Loaded as a user does; in float64, where no two logits tie."""
    loaded = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float64)
    assert not any("forward" in vars(module) for module in loaded.modules())
    return loaded


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    seen = torch.arange(12)[None] * 7 % 61 + 3
    return [seen, *(torch.randint(3, 64, (1, n), generator=generator) for n in (1, 2, 5, 17))]


def greedy(model: Any, prompt: Tensor, **options: Any) -> list[int]:
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        **options,
    )
    return output[0].tolist()


class Forwards:
    """Counts a model's forwards by their number of layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.rows = [0] * len(model.model.layers)
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_hook(lambda module, args, output, index=index: self.add(index))

    def add(self, index: int) -> None:
        self.rows[index] += 1


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_assistant_early_exit_gives_the_tokens_of_plain_generate(
    model: PreTrainedModel, exit_layer: int
) -> None:
    for prompt in prompts():
        expected = greedy(model, prompt)
        counted = copy.deepcopy(model)
        forwards = Forwards(counted)
        assert greedy(counted, prompt, assistant_early_exit=exit_layer) == expected
        assert forwards.rows[exit_layer - 1] > forwards.rows[exit_layer] > 0  # it really drafted early
        assert len(forwards.rows) == 4


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_a_truncated_copy_that_shares_its_weights_assists(model: PreTrainedModel, exit_layer: int) -> None:
    shared: dict[int, Any] = {id(weight): weight for weight in model.parameters()}
    assistant = copy.deepcopy(model, shared)
    assistant.model.layers = assistant.model.layers[:exit_layer]
    assistant.config.num_hidden_layers = exit_layer
    assert assistant.lm_head.weight is model.lm_head.weight
    for prompt in prompts():
        expected = greedy(model, prompt)
        assert greedy(model, prompt, assistant_model=assistant) == expected
    assert greedy(assistant, prompts()[0]) != greedy(model, prompts()[0]) or exit_layer == 3


def test_training_has_left_exits_that_agree(model: PreTrainedModel) -> None:
    """Otherwise the two tests above would compare drafts that are never accepted."""
    prompt = prompts()[0]
    counted = copy.deepcopy(model)
    forwards = Forwards(counted)
    greedy(counted, prompt, assistant_early_exit=3)
    assert forwards.rows[3] < NEW_TOKENS - 4


def test_the_export_is_a_plain_checkpoint(exported: Path, model: PreTrainedModel) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert list(model.state_dict()) == list(tiny_model().state_dict())
