"""Whether drafting heads belong to a target and are told the right things: `python -m eval doctor`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from eval.decoding.drafters.eagle import EagleDraft
from eval.decoding.drafters.heads import DraftHeads, HeadsDrafter
from eval.decoding.drafters.hydra import HydraDraft
from eval.decoding.drafters.medusa import MedusaDraft
from eval.decoding.growing import Shape
from eval.decoding.static_tree import TreeShape
from eval.decoding.strategies import make_drafter
from eval.draft_heads import HEADS_OF, drafting_strategy
from eval.head_acceptance import (
    TEXTS,
    Explanation,
    Request,
    acceptance_length,
    explanation,
    hits_of_eagle,
    hits_of_heads,
    is_far,
    own_texts,
    shares,
)
from eval.head_check import compare
from eval.head_reading import HeadReader
from eval.prompts import HELDOUT
from eval.target import Target
from eval.tree_ranks import Text
from layerskip_model.eagle3 import Eagle3Head
from layerskip_model.errors import UserError
from layerskip_model.formats import heads_import
from layerskip_model.formats.eagle import build, eagle_kind, read_eagle
from layerskip_model.formats.fingerprint import checkpoint_directory, fingerprint
from layerskip_model.formats.heads import heads_directory
from layerskip_model.formats.huggingface import has_plain_weights
from layerskip_model.formats.record import Record, read_record
from layerskip_model.head_probe import Head
from layerskip_model.rope import named_bases, rope_of, spoken_rope

STEPS = 5  # of an EAGLE head that nobody measured
Verdict = Literal["ok", "wrong", "unknown"]


@dataclass(frozen=True)
class Finding:
    """What one check found. `cause` says more where something is wrong."""

    check: str
    verdict: Verdict
    found: str
    expected: str = ""
    cause: str = ""


@dataclass(frozen=True)
class Examination:
    """Everything that was found of the heads in a directory."""

    model: str
    draft: str
    kind: str
    findings: list[Finding]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.verdict != "wrong" for finding in self.findings)


def examine(target: Target, name: str, request: Request) -> Examination:
    """Check the heads of that name for a target. Raises UserError where there are none, or they cannot be read."""
    directory = heads_directory(name)
    kind = eagle_kind(directory) or drafting_strategy(name)
    if kind in HEADS_OF.values():
        findings = _medusa_or_hydra(target, name, directory, kind, request)
    elif eagle_kind(directory) is not None:
        findings = _eagle(target, name, directory, request)
    else:
        raise UserError(f"--draft '{name}' has no Medusa, Hydra or EAGLE heads; name a directory that has")
    return Examination(target.name, name, kind, findings)


def _eagle(target: Target, name: str, directory: Path, request: Request) -> list[Finding]:
    stored, runner = read_eagle(directory), target.runner
    found = [_fingerprint(target, stored.config), _rope(target, stored.config)]
    # 1. Whatever contradicts the model by its sizes, layers or vocabulary.
    try:
        head = build(stored, runner.backbone, name).to(runner.dtype).requires_grad_(False).eval()
        growth, chain = Shape(STEPS, 1, STEPS), TreeShape.chain(STEPS)
        draft = EagleDraft.of(name, head, runner, tree=chain, growth=growth)
    except UserError as error:
        return [*found, Finding("shapes", "wrong", "cannot be loaded", cause=str(error))]
    found += [*_sizes(target, draft.heads), _dtype(target, stored.dtype)]
    # 2. Whether it says what it said, and guesses as well as it did.
    record, reader = read_record(directory), HeadReader(draft, runner)
    steps = len(record.agreement) or STEPS
    probe = _probe(target, draft, record)
    hits = partial(hits_of_eagle, reader, steps, reader.right)
    explain = partial(explanation, reader, steps)
    is_told_right = probe.verdict == "ok"
    return [*found, probe, *_acceptance(target, request, record, hits, explain, is_told_right=is_told_right)]


def _medusa_or_hydra(
    target: Target, name: str, directory: Path, kind: str, request: Request
) -> list[Finding]:
    form = heads_import.HYDRA if kind == "hydra" else heads_import.MEDUSA
    stored, runner = form.read(directory), target.runner
    found = [_fingerprint(target, stored.config)]
    try:
        heads = form.build(stored, runner.backbone, name).to(runner.dtype).requires_grad_(False).eval()
    except UserError as error:
        return [*found, Finding("shapes", "wrong", "cannot be loaded", cause=str(error))]
    backbone, chain = runner.backbone, TreeShape.chain(heads.number)
    sizes = f"{heads.number} heads, hidden size {backbone.hidden_size}, vocabulary {backbone.vocab_size}"
    dtype = next(iter(stored.tensors.values())).dtype
    found += [Finding("shapes", "ok", sizes, "the model's"), _dtype(target, dtype)]
    draft: DraftHeads
    if kind == "hydra":
        draft = HydraDraft.of(name, heads, chain, runner)
    else:
        draft = MedusaDraft(name, heads, heads.number, chain)
    drafter = cast(HeadsDrafter, make_drafter(kind, runner, draft=draft, tree=chain))
    return found + _acceptance(target, request, read_record(directory), partial(hits_of_heads, drafter))


def _fingerprint(target: Target, config: dict[str, object]) -> Finding:
    """Whether the model's weights are those that the heads were trained on."""
    trained_on, check = config.get("base_fingerprint"), "weights of the model"
    ours = fingerprint(checkpoint_directory(target.name))
    if not isinstance(trained_on, str):
        return Finding(check, "unknown", ours[:12], "the heads do not tell which they were trained on")
    if ours == trained_on:
        return Finding(check, "ok", ours[:12], trained_on[:12])
    cause = f"they were trained on '{config.get('base_model_name_or_path')}', with other weights than this model's"
    return Finding(check, "wrong", ours[:12], trained_on[:12], cause)


def _rope(target: Target, config: dict[str, object]) -> Finding:
    """How the head's configuration turns positions, and how the model's does."""
    kind = target.runner.kinds[0]
    ours, theirs = rope_of(target.runner.backbone.config.to_dict(), kind), rope_of(config, kind)
    told = spoken_rope(theirs) + ("" if named_bases(config, kind) else " (none is named)")
    if theirs == ours:
        return Finding("RoPE", "ok", told, "the model's")
    cause = (
        "the head's is not the model's, which is right if it was trained so: config.json alone cannot tell"
    )
    return Finding("RoPE", "unknown", told, f"{spoken_rope(ours)} in the model", cause)


def _sizes(target: Target, head: Head) -> list[Finding]:
    """Of a head that could be built: what it has in common with its model."""
    backbone = target.runner.backbone
    found = [Finding("shapes", "ok", f"a layer of hidden size {backbone.hidden_size}", "the model's")]
    if isinstance(head, Eagle3Head):
        reads, size = list(head.reads), head.vocabulary.size
        layers = Finding("features", "ok", f"inputs of layers {reads}", f"three of {backbone.num_layers}")
        words = Finding("vocabulary", "ok", f"{size} tokens", f"of the model's {backbone.vocab_size}")
    else:
        layers = Finding("features", "ok", "the states that enter the LM head", "EAGLE's")
        words = Finding("vocabulary", "ok", f"all {backbone.vocab_size} tokens", "the model's LM head")
    return [*found, layers, words]


def _dtype(target: Target, stored: torch.dtype) -> Finding:
    """Rounding is no mistake, but worth knowing."""
    ours = str(target.runner.dtype).removeprefix("torch.")
    return Finding("dtype", "ok", f"run in {ours}", f"stored in {str(stored).removeprefix('torch.')}")


def _probe(target: Target, draft: EagleDraft, record: Record) -> Finding:
    """Whether it says what it said when it was exported."""
    if record.probe is None:
        return Finding("probe", "unknown", "-", "the head was exported without")
    if not has_plain_weights(target.model):
        return Finding("probe", "unknown", "-", "the model is quantized, or lies on several devices")
    agreement = compare(draft, target.runner, record.probe)
    found, expected = f"off by {agreement.off:.2g}", f"at most {agreement.allowed:g}"
    if agreement.is_right:
        return Finding("probe", "ok", found, expected)
    return Finding(
        "probe",
        "wrong",
        found,
        expected,
        f"it does not say what it said when it was exported: {agreement.in_words()}",
    )


def _acceptance(
    target: Target,
    request: Request,
    record: Record,
    hits: Callable[[Text], Tensor],
    explain: Callable[[list[Text]], Explanation | None] | None = None,
    *,
    is_told_right: bool = False,
) -> list[Finding]:
    """How many drafts the target's own text would accept, against what was recorded, and why so few."""
    check, recorded = "acceptance length", record.acceptance_length
    told = "not recorded" if recorded is None else f"{recorded:.2f} in training"
    if request.dataset == HELDOUT and target.run is None:
        return [Finding(check, "unknown", "-", f"{told}; no held-out prompts here, give --dataset")]
    texts = own_texts(target, request)
    seen = [hits(text) for text in texts]
    length = acceptance_length(seen)
    if length is None:
        return [Finding(check, "unknown", "-", f"{told}; every continuation is too short")]
    verdict, cause = _judged(length, recorded, texts, explain, is_told_right=is_told_right)
    agreement = " ".join(f"{share:.0%}" for share in record.agreement)
    right = " ".join(f"{share:.0%}" for share in shares(seen))
    return [
        Finding("right in each step", "ok" if agreement else "unknown", right, agreement or "not recorded"),
        Finding(check, verdict, f"{length:.2f}", told, cause),
    ]


def _judged(
    length: float,
    recorded: float | None,
    texts: list[Text],
    explain: Callable[[list[Text]], Explanation | None] | None,
    *,
    is_told_right: bool,
) -> tuple[Verdict, str]:
    """Whether so few drafts mean a mistake, and the cause.

    Few texts tell little, as weak heads are helped by many a mistake on some of them; and where the probe shows that
    heads are told what they were in training, it is the text that is harder.
    """
    few = recorded is not None and is_far(length, recorded)
    if recorded is not None and not few:
        return "ok", ""
    cause = "far fewer drafts would be accepted than when they were trained" if few else ""
    if len(texts) < TEXTS:
        little = f"only {len(texts)} of the prompts could be used, which tells little; give {TEXTS} or more"
        return "unknown", f"{cause}, but {little}" if few else little
    if is_told_right:
        return "unknown", f"{cause}, on text that they find harder: the probe is right" if few else ""
    reason = explain(texts) if explain is not None else None
    if reason is not None:
        better = f"with {reason.mistake.name} it would be {reason.length:.2f} where it is {reason.before:.2f}"
        return "wrong", better
    return "wrong" if few else "unknown", cause
