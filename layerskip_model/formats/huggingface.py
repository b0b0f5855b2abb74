"""Load models and tokenizers from a directory or the hub, with errors a user can act on."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import is_fsdp_enabled, is_local_dist_rank_0
from transformers.utils import logging as transformers_logging

from layerskip_model.backbone import Backbone, has_values
from layerskip_model.errors import UserError
from layerskip_model.formats.hub import hub_refusal, is_hub_name

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# How transformers spreads a model over the devices there are, then the CPU, then the disk.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
QUANTIZATIONS = ("4bit", "8bit")
FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4")  # they take no mask of ours
LONGEST_REASON = 240  # characters of another library's message


def load_model(
    name_or_path: str,
    *,
    dtype: str = "float32",
    device_map: str | torch.device | dict[str, Any] | None = None,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, as transformers loads it, each weight straight to its place.

    Args:
        name_or_path: a directory, or a hub name.
        dtype: a name in DTYPES, or "auto": the one that the checkpoint is stored in.
        device_map: a device, one of DEVICE_MAPS, or the names of modules with theirs ("disk" is one too);
            default: the CPU.
        quantization: one of QUANTIZATIONS, by bitsandbytes, for the layers' matrices; they compute in `dtype`.
        attn_implementation: a name that transformers knows; default: its choice.
        config: one of fewer layers, in place of the stored one; the weights of the others are not read.

    Raises UserError where there is no such model, naming the place and what is missing, and where the stored
    weights are not exactly those of the model: what is missing would be random numbers.
    """
    _require_checkpoint(name_or_path)
    loaded: Any
    try:
        with _without_warnings(), nullcontext() if sys.stderr.isatty() else no_progress_bar():
            loaded = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                dtype=dtype if dtype == "auto" else DTYPES[dtype],
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **_quantized(name_or_path, quantization, dtype),
                **_attention(attn_implementation),
                **({} if config is None else {"config": config}),
            )
    except UserError:
        raise
    except Exception as error:  # the parsers of configurations and weights raise whatever they like
        raise _cannot_load(name_or_path, "cannot be loaded", error) from error
    model, report = loaded
    if config is not None:
        depth = config.get_text_config().num_hidden_layers
        report["unexpected_keys"] = [key for key in report["unexpected_keys"] if not _is_deeper(key, depth)]
    _require_exact_weights(name_or_path, report)
    return model


def load_config(name_or_path: str) -> PreTrainedConfig:
    """The configuration of a checkpoint: a directory or a hub name. Raises UserError if there is none."""
    _require_checkpoint(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except Exception as error:  # the parser of configurations raises whatever it likes
        raise _cannot_load(name_or_path, "cannot be loaded", error) from error


def outline(name_or_path: str, config: PreTrainedConfig) -> Backbone:
    """The model of a configuration without any weights, on the meta device.

    Raises UserError, which calls it `name_or_path`, for one that is no decoder.
    """
    try:
        with torch.device("meta"):
            return Backbone(AutoModelForCausalLM.from_config(copy.deepcopy(config)))
    except UserError:
        raise
    except Exception as error:  # whatever a configuration's model class makes of it
        raise UserError(
            f"model '{name_or_path}' is no decoder-only language model ({one_line(error)})"
        ) from error


def has_plain_weights(model: PreTrainedModel) -> bool:
    """Whether the weights are floating-point numbers on one device: not quantized, spread or offloaded."""
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    devices = {parameter.device for parameter in model.parameters()}
    return not is_quantized and len(devices) == 1 and torch.device("meta") not in devices


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, or of a directory with nothing else. Raises UserError if there is none."""
    if not (Path(name_or_path) / "tokenizer_config.json").is_file():
        _require_checkpoint(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # the tokenizer backends raise whatever their parser raises
        fix = "has no tokenizer that can be loaded; save one there with tokenizer.save_pretrained"
        raise _cannot_load(name_or_path, fix, error) from error


def begin_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text begins after: bos where the tokenizer puts it before texts by itself, else eos.

    Raises UserError where there is neither.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        return bos
    if eos is None and bos is None:
        raise UserError(
            "the tokenizer has no bos_token and no eos_token for a text to begin after; give it one"
        )
    return eos if eos is not None else bos


def new_model(config: dict[str, Any], *, attn_implementation: str | None = None) -> PreTrainedModel:
    """A model with random weights (drawn from torch's generator) in float32, from a config with `model_type`.

    Under DeepSpeed's ZeRO-3 it is born split over the ranks, and its weights are drawn in another order; where FSDP
    sends one process's weights to the others, these have none yet (the meta device). Raises UserError for an
    unknown model type, for keys that this type does not have, and for sizes that make no model that runs.
    """
    settings = dict(config)
    kind = str(settings.pop("model_type", ""))
    if kind not in CONFIG_MAPPING:
        nearest = (get_close_matches(kind, list(CONFIG_MAPPING)) or ["llama"])[0]
        raise UserError(
            f"model.config.model_type: '{kind}' is no model type of transformers; try '{nearest}'"
        )
    _require_known_keys(settings, kind)
    try:
        with init_empty_weights(include_buffers=False) if is_sent_weights() else nullcontext():
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(kind, **settings), dtype=torch.float32, **_attention(attn_implementation)
            )
        if model.config.get_text_config().num_hidden_layers < 1:
            raise ValueError("num_hidden_layers is less than 1")
        if has_values(model) and attn_implementation not in FLASH_ATTENTION:  # which needs a GPU
            with torch.no_grad():  # some impossible sizes show only here
                model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except Exception as error:  # whatever the model makes of impossible sizes
        raise UserError(f"model.config: no '{kind}' model can be made of it: {one_line(error)}") from error
    return model.train()


def is_sent_weights() -> bool:
    """Whether this process loads no weights because FSDP will send it those of another one (accelerate's
    fsdp_cpu_ram_efficient_loading)."""
    return is_fsdp_enabled() and not is_local_dist_rank_0()


def one_line(error: BaseException) -> str:
    """An error's message in one line of readable length, with its type where that says more."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def _attention(attn_implementation: str | None) -> dict[str, Any]:
    return {"attn_implementation": attn_implementation} if attn_implementation else {}


def _quantized(name_or_path: str, quantization: str | None, dtype: str) -> dict[str, Any]:
    """What transformers is told so that it quantizes the weights while it loads them."""
    if quantization is None:
        return {}
    if getattr(AutoConfig.from_pretrained(name_or_path), "quantization_config", None) is not None:
        raise UserError(f"model '{name_or_path}' is stored quantized already; load it without quantization")
    if quantization == "8bit":  # LLM.int8(), arXiv 2208.07339
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(  # NF4, arXiv 2305.14314
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype]
    )
    return {"quantization_config": config}


def _require_checkpoint(name_or_path: str) -> None:
    """A path that exists must be a checkpoint directory; anything else is taken for a hub name."""
    path = Path(name_or_path)
    if not name_or_path.strip():
        raise UserError("model '' is empty; give a directory, or a hub name of the form owner/name")
    if path.is_file():
        raise UserError(f"model '{name_or_path}' is a file; name the directory that holds config.json")
    if path.is_dir() and not (path / "config.json").is_file():
        inner = [child.name for child in sorted(path.iterdir()) if (child / "config.json").is_file()]
        fix = f"; did you mean '{path / inner[0]}'?" if inner else ""
        raise UserError(f"model '{name_or_path}' is not a checkpoint: it has no config.json{fix}")
    if not path.exists() and not is_hub_name(name_or_path):
        raise UserError(
            f"model '{name_or_path}': no such directory, and not a hub name of the form owner/name"
        )


def _require_exact_weights(name_or_path: str, report: dict[str, Any]) -> None:
    """Refuse a checkpoint with weights that are missing, of other shapes, or of another model."""
    where = f"model '{name_or_path}' cannot be loaded"
    for key, stored, expected in sorted(report["mismatched_keys"]):
        raise UserError(
            f"{where}: '{key}' has shape {list(stored)} in the checkpoint and {list(expected)} by config.json"
        )
    for name, what in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has what config.json has no place for"),
    ):
        keys = sorted(report[name])
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(
                f"{where}: the checkpoint {what}: '{keys[0]}'{more}; is it complete and this type?"
            )


def _is_deeper(key: str, depth: int) -> bool:
    """Whether a weight belongs to a layer that a model of `depth` layers does not have."""
    layer = re.search(r"\blayers\.(\d+)\.", key)
    return layer is not None and int(layer[1]) >= depth


def _require_known_keys(settings: dict[str, Any], kind: str) -> None:
    """Refuse configuration keys that the model type would keep and never read."""
    config = AutoConfig.for_model(kind)
    known = sorted({*config.to_dict(), *config.attribute_map})
    for key in sorted(set(settings) - set(known)):
        nearest = get_close_matches(key, known, n=1, cutoff=0.5)
        fix = f"; did you mean '{nearest[0]}'?" if nearest else ""
        raise UserError(
            f"model.config.{key}: unknown key (value {settings[key]!r}) for model type '{kind}'{fix}"
        )


def _cannot_load(name_or_path: str, what: str, error: BaseException) -> UserError:
    """The error for a model that could not be loaded, or not be reached."""
    where = f"model '{name_or_path}'"
    return hub_refusal(where, error) or UserError(f"{where} {what} ({one_line(error)})")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without transformers' table of weights that don't fit: they are refused here in one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Without transformers' bars over the files and tensors of a checkpoint on disk."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
