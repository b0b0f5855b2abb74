"""EAGLE heads draft the right trees: those of a head that computes every path anew from the whole text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eval.decoding.acceptance import Outcome
from eval.decoding.drafters.base import State
from eval.decoding.drafters.eagle import HeadLayer
from eval.decoding.growing import Shape
from eval.decoding.sampling import Sampling
from eval.decoding.shaping import Shaping
from eval.decoding.static_tree import TreeShape
from eval.decoding.tree import Draft
from layerskip_model.eagle import unrolled
from tests.eval.decoding.eagle_heads import (
    CASES,
    NEW,
    NO_REPEATS,
    Fitted,
    Twin,
    drafting,
    naive_features,
)
from tests.eval.decoding.test_self_tree import drafts_of, run
from tests.eval.decoding.test_speculate import PROMPTS
from tests.layerskip_model.tiny_eagle import some_head

LLAMA = Fitted()
TOLERANCE = 1e-5  # norms and softmaxes of float64 models compute in float32


@pytest.mark.parametrize("case", CASES)
def test_the_draft_is_that_of_separate_paths(case: str) -> None:
    """At every step, after paths that were accepted in part, to the end of each text."""
    LLAMA.check_drafts(case)
    lengths = {won for row in run(LLAMA.runner, LLAMA.drafter(case), PROMPTS) for won in row.accepted_lengths}
    assert {1, 2, 3, 4} <= lengths  # rejected at once, never, and in between


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "gemma2", "phi3"])
def test_other_kinds_of_attention(kind: str) -> None:
    """In the head, too: sliding windows shorter than the texts, layers that cannot be fused."""
    # What a head makes is not normed: a low cap would make many logits equal.
    fitted = Fitted(kind, **({"final_logit_softcapping": 60.0} if kind == "gemma2" else {}))
    for case in ("eagle, tree", "eagle3, tree"):
        fitted.check_drafts(case, new=10)
        rows = run(fitted.runner, fitted.drafter(case), PROMPTS)
        assert [row.tokens for row in rows] == fitted.future
        assert max(max(row.accepted_lengths) for row in rows) > 2


@pytest.mark.parametrize("case", CASES)
def test_each_node_is_chosen_after_its_own_path(case: str) -> None:
    """By the noise of its own place, and without what the rule forbids there."""
    LLAMA.check_drafts(case, new=10, rule=Sampling(Shaping(NO_REPEATS, (), 64), 3))


@pytest.mark.parametrize("new", range(1, 6))
@pytest.mark.parametrize("case", CASES)
def test_drafts_end_where_the_text_does(case: str, new: int) -> None:
    LLAMA.check_drafts(case, new=new)


@pytest.mark.parametrize(
    ("depth", "width", "count"), [(1, 1, 1), (1, 5, 2), (5, 1, 5), (2, 4, 20), (4, 2, 3)]
)
def test_any_shape_of_tree(depth: int, width: int, count: int) -> None:
    """With a head that has learnt nothing and can say every token."""
    head = some_head("eagle3", LLAMA.model).requires_grad_(False).eval()
    fitted = Fitted()
    fitted.heads["eagle3"] = head
    fitted.check_drafts("eagle3, tree", new=8, shape=Shape(depth, width, count))


def test_a_width_of_one_is_a_chain() -> None:
    """And the same as the static one."""
    chains = [
        drafting(name, LLAMA.runner, LLAMA.drafts[name], shape)
        for name, shape in (("eagle", TreeShape.chain(4)), ("eagle2", Shape(4, 1, 4)))
    ]
    static, grown = (drafts_of(LLAMA.runner, chain, PROMPTS) for chain in chains)
    assert len(static) == len(grown)
    for (_, one), (_, other) in zip(static, grown, strict=True):
        assert one.is_chain
        assert other.is_chain
        assert torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize("strategy", ["eagle2", "eagle3"])
def test_in_a_decode_a_head_computes_what_it_did_in_training(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says in each step of a chain is what the unrolled steps say there, as long as the chain is right."""
    said: list[Tensor] = []
    logits = HeadLayer.logits

    def noted(self: HeadLayer, outputs: Tensor) -> Tensor:
        said.append(logits(self, outputs))
        return said[-1]

    monkeypatch.setattr(HeadLayer, "logits", noted)
    drafter = LLAMA.drafter(f"{strategy}, chain")
    layer: HeadLayer = drafter.layer  # type: ignore[attr-defined]
    expected = [_in_training(LLAMA, strategy, layer, row) for row in range(len(PROMPTS))]
    said.clear()
    compared = [0] * 4
    for texts, draft in drafts_of(LLAMA.runner, drafter, PROMPTS, NEW):
        levels = [said.pop(0) for _ in range(draft.num_nodes - 1)]
        for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
            right = [*prompt, *LLAMA.future[row]][len(text) :]
            drafts = draft.tokens[row, 1:].tolist()
            for step, level in enumerate(levels):
                if len(text) + step < len(prompt) + NEW and drafts[:step] == right[:step]:
                    wanted = expected[row][step][len(text) - 2]
                    torch.testing.assert_close(level[row, 0], wanted, rtol=TOLERANCE, atol=TOLERANCE)
                    compared[step] += 1
    assert not said
    assert min(compared) > 1


@torch.inference_mode()
def _in_training(fitted: Fitted, strategy: str, layer: HeadLayer, row: int) -> list[Tensor]:
    """What each step says at every place of a row's whole text, [seq, vocab] each."""
    text, head = PROMPTS[row] + fitted.future[row], fitted.head(strategy)
    embedded = fitted.runner.embed(torch.tensor([text[1:]]))
    features = naive_features(fitted.model, head, text[:-1])[None]
    steps = unrolled(head, embedded, features, torch.arange(len(text) - 1)[None], 4)
    return [HeadLayer.logits(layer, output[0]) for output in steps]


@pytest.mark.parametrize("first", [0, 5, 40])
def test_along_a_text_each_guess_follows_its_own_tokens(first: int) -> None:
    """What decides a tree: the logits that decoding would have after the right path."""
    text = PROMPTS[0] + LLAMA.future[0]
    drafter: Any = LLAMA.drafter("eagle, tree")
    with torch.inference_mode():
        hidden = LLAMA.runner.backbone.final_states(torch.tensor([text]))[0]
        found = list(drafter.along(hidden, torch.tensor(text), first))
        assert [len(logits) for logits in found] == [max(0, len(text) - 2 - i - first) for i in range(10)]
        for place in range(first, len(text) - 2):
            twin = Twin(LLAMA.model, LLAMA.head("eagle"), text[: place + 2])
            for index, logits in enumerate(found[:4]):
                if place - first < len(logits):
                    (expected,) = twin.after([tuple(text[place + 2 : place + 2 + index])])
                    torch.testing.assert_close(
                        logits[place - first], expected, rtol=TOLERANCE, atol=TOLERANCE
                    )


READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")


class NothingIsRead(TorchDispatchMode):
    """Raises where what a tensor holds decides what is done: there a device would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        masks = [one for one in args[1] if one is not None] if name in ("index", "index_put") else []
        if name.startswith(READS) or any(mask.dtype == torch.bool for mask in masks):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nor taken to the host."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor is taken to the host")

    with monkeypatch.context() as patch, NothingIsRead():
        for name in ("tolist", "cpu", "numpy"):
            patch.setattr(Tensor, name, refuse)
        yield


def test_what_waits_for_a_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    some = torch.arange(3)
    for read in (
        lambda: some.tolist(),
        lambda: some[0].item(),
        lambda: bool(some[0] > 0),
        lambda: some[some > 0],
        lambda: some.nonzero(),
        lambda: torch.equal(some, some),
    ):
        with pytest.raises(AssertionError), nothing_is_read(monkeypatch):
            read()


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "three"])
@pytest.mark.parametrize("case", CASES)
def test_drafting_waits_for_no_device(
    case: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the end of a verification to the next draft."""
    drafter = LLAMA.drafter(case)
    propose, advance = drafter.propose, drafter.advance

    def proposed(state: State) -> Draft:
        with nothing_is_read(monkeypatch):
            return propose(state)

    def advanced(outcome: Outcome) -> None:
        with nothing_is_read(monkeypatch):
            advance(outcome)

    drafter.propose, drafter.advance = proposed, advanced  # type: ignore[method-assign]
    rows = run(LLAMA.runner, drafter, prompts)
    assert [row.tokens for row in rows] == LLAMA.future[: len(prompts)]
