"""Flags that commands share, in groups: dataclasses whose fields are options, flattened for typer by `with_flags`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from layerskip_model.command_line import flag

if TYPE_CHECKING:
    from eval.target import Target


def given(group: Any) -> dict[str, Any]:
    """The flags of a group that were given, by name: those that are not None."""
    return {name: value for name, value in vars(group).items() if value is not None}


OutputDir = Annotated[str | None, flag("output_dir", "where files go, made if need be; default: no files")]


@dataclass(frozen=True)
class Loading:
    """Which model, and how it is loaded: the arguments of `eval.target.load_target`."""

    model: Annotated[str | None, flag("model", "checkpoint directory or hub name")] = None
    run: Annotated[
        str | None, flag("run", "output_dir of a finished training run, in place of a --model")
    ] = None
    dtype: Annotated[
        str | None, flag("dtype", "float32 (default on a CPU), bfloat16 (on a GPU), float16, float64")
    ] = None
    device: Annotated[
        str | None, flag("device", "cpu, cuda, cuda:1, ...; by default the first GPU if any")
    ] = None
    device_map: Annotated[
        str | None,
        flag("device_map", "auto: over all GPUs, then the CPU, then the disk, in place of --device"),
    ] = None
    quantization: Annotated[
        str | None, flag("quantization", "4bit or 8bit: weights by bitsandbytes, on a CUDA GPU")
    ] = None
    attn_implementation: Annotated[
        str | None,
        flag("attn_implementation", "sdpa, eager or flash_attention_2; default: transformers' choice"),
    ] = None

    def load(self, **changes: Any) -> Target:
        """The target, with these arguments in place of the flags'. Raises UserError."""
        from eval.target import load_target

        return load_target(**{**vars(self), **changes})


ExitLayer = Annotated[
    int | None, flag("exit_layer", "E: the first E layers draft (self_speculative, hf_early_exit)")
]
NumSpeculations = Annotated[
    int | None,
    flag("num_speculations", "d: drafts a step, the depth of a draft tree (all that draft but lookahead)"),
]


@dataclass(frozen=True)
class Drafting:
    """Settings of strategies, by the names that they have there."""

    exit_layer: ExitLayer = None
    num_speculations: NumSpeculations = None
    draft_stop: Annotated[
        str | None, flag("draft_stop", "confidence: end a draft that is unsure (self_speculative)")
    ] = None
    stop_threshold: Annotated[
        float | None,
        flag("stop_threshold", "with --draft_stop: the probability under which a draft ends, 0 to 1"),
    ] = None
    draft_tree: Annotated[
        bool | None, flag("draft_tree", "draft a tree in place of a chain (self_speculative)")
    ] = None
    tree_top_k: Annotated[
        int | None,
        flag(
            "tree_top_k",
            "children of a node, and nodes that go on a level (--draft_tree, eagle2, eagle3; there 1 is a chain)",
        ),
    ] = None
    tree_tokens: Annotated[
        int | None,
        flag(
            "tree_tokens",
            "drafts of the tree that are verified (--draft_tree, and all that draft with heads)",
        ),
    ] = None
    draft: Annotated[
        str | None,
        flag(
            "draft",
            "directory or hub name of a draft model (speculative_sampling, hf_assisted) or of heads (medusa, hydra, "
            "eagle, eagle2, eagle3), which may be the run that trained them",
        ),
    ] = None
    tree: Annotated[
        str | None,
        flag(
            "tree",
            "chain, the name of a published tree, or a tree's JSON file (medusa, hydra, eagle); default: the tree "
            "beside the heads, else a chain, on a GPU medusa_mc_sim_7b_63, for EAGLE's eagle_mc_sim_7b_63",
        ),
    ] = None
    max_ngram: Annotated[
        int | None, flag("max_ngram", "longest n-gram that is looked up (prompt_lookup, hf_prompt_lookup)")
    ] = None
    window: Annotated[int | None, flag("window", "W: columns of the window (lookahead)")] = None
    level: Annotated[int | None, flag("level", "N: tokens of an n-gram (lookahead)")] = None
    guess_set: Annotated[
        int | None, flag("guess_set", "G: n-grams that are verified together (lookahead)")
    ] = None


@dataclass(frozen=True)
class ChoosingFlags:
    """How tokens are chosen: fields of `eval.choosing.Choosing`, whether to sample at all being the command's."""

    temperature: Annotated[float | None, flag("temperature", "of the sampling, above 0")] = None
    top_k: Annotated[int | None, flag("top_k", "sample among the k most likely tokens; 0: all")] = None
    top_p: Annotated[
        float | None, flag("top_p", "sample among the most likely tokens of this total probability")
    ] = None
    seed: Annotated[int, flag("seed", "of all random numbers")] = 0
    acceptance: Annotated[
        str | None,
        flag(
            "acceptance",
            "lossless (default), or typical: keep drafts that the model finds likely enough, which changes "
            "what is sampled",
        ),
    ] = None
    posterior_threshold: Annotated[
        float | None, flag("posterior_threshold", "epsilon of --acceptance typical")
    ] = None
    posterior_alpha: Annotated[float | None, flag("posterior_alpha", "delta of --acceptance typical")] = None


@dataclass(frozen=True)
class Prompts:
    """Which prompts are decoded, how far, and how many together."""

    dataset: Annotated[str, flag("dataset", "a JSONL file with prompt or turns, or heldout")] = "heldout"
    num_samples: Annotated[
        int | None, flag("num_samples", "prompts; default: 32, or all of a smaller file")
    ] = None
    max_steps: Annotated[int, flag("max_steps", "new tokens a prompt")] = 128
    batch_size: Annotated[int, flag("batch_size", "prompts decoded together")] = 1


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters may be groups, with the flat signature that typer reads."""
    kinds = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    flat: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if is_dataclass(kinds[name]):
            groups[name] = kinds[name]
            types = get_type_hints(kinds[name], include_extras=True)
            flat += [
                Parameter(
                    field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
                )
                for field in fields(kinds[name])
            ]
        else:
            flat.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=kinds[name]))

    @wraps(command)
    def run(**values: Any) -> None:
        made = {
            name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        command(**made, **values)

    run.__signature__ = Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return run
