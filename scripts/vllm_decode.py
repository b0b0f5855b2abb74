"""Decode greedily with vLLM, with drafts or without: vLLM's half of vllm_draft_model.py and vllm_heads.py.

python vllm_decode.py JOB.json RESULT.json     (needs vLLM and nothing of this repository)

JOB: model (directory or hub name), speculation (a speculative_config, or null), max_steps, prompts (token ids each).
RESULT: version; tokens; and with drafts, for each prompt, drafts (proposals) and accepted (at each position).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, on a CPU
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, which starts in half the time

import vllm

DRAFTS = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos"


def main(job_path: str, result_path: str) -> None:
    """Decode one prompt after another, so that the counters can be read for each."""
    job = json.loads(Path(job_path).read_text())
    speculation = job["speculation"]
    depth = speculation["num_speculative_tokens"] if speculation else 0
    options: dict[str, Any] = {"speculative_config": speculation} if speculation else {}
    llm = vllm.LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        disable_log_stats=False,
        max_num_seqs=4,
        **options,
    )
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=job["max_steps"])
    result: dict[str, Any] = {"version": vllm.__version__, "tokens": [], "drafts": [], "accepted": []}
    before = counters(llm, depth)
    for prompt in job["prompts"]:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
        result["tokens"].append(list(output.outputs[0].token_ids))
        after = counters(llm, depth)
        drafts, *accepted = (now - then for now, then in zip(after, before, strict=True))
        result["drafts"].append(drafts)
        result["accepted"].append(accepted)
        before = after
    Path(result_path).write_text(json.dumps(result) + "\n")


def counters(llm: vllm.LLM, depth: int) -> list[int]:
    """Proposals so far, and the drafts accepted at each position."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    if DRAFTS not in found:  # nothing drafts
        return [0] * (1 + depth)
    return [found[DRAFTS].value, *found[ACCEPTED].values]


if __name__ == "__main__":
    main(*sys.argv[1:])
