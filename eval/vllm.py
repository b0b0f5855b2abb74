"""The same drafts in vLLM and here: are they accepted as often, and is the output the same?

vLLM wants versions of its own, so it runs in a Python of its own, by a script that needs nothing of ours.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from eval.decoding.drafters.base import Drafter
from eval.decoding.speculate import decode
from eval.prompts import Prompt
from eval.statistics import bootstrap_interval
from eval.target import Target
from layerskip_model.errors import UserError


@dataclass(frozen=True)
class Counted:
    """What came of each prompt.

    Attributes:
        tokens: the new ones.
        proposals: those that had a draft at each position, [prompt][position].
        accepted: those of them that were accepted up to it.
    """

    tokens: list[list[int]]
    proposals: list[list[int]]
    accepted: list[list[int]]


@dataclass(frozen=True)
class Engine:
    """A Python that has vLLM, and the script that it runs: `script JOB.json RESULT.json`."""

    python: str
    script: Path

    def require(self) -> None:
        """Raises UserError where there is no such program."""
        if which(self.python) is None:
            raise UserError(
                f"--vllm_python '{self.python}' is no program; name the python of vLLM's environment"
            )

    def run(self, name: str, job: dict[str, Any]) -> dict[str, Any]:
        """What the script makes of a job. Raises UserError, which names the job, with vLLM's last words."""
        with TemporaryDirectory() as place:
            job_path, result_path = Path(place) / "job.json", Path(place) / "result.json"
            job_path.write_text(json.dumps(job) + "\n")
            command = [self.python, str(self.script), str(job_path), str(result_path)]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            if done.returncode != 0:
                last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
                raise UserError(f"--vllm_python '{self.python}': vLLM {name} failed ({last})")
            return json.loads(result_path.read_text())


def compare(
    engine: Engine,
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    *,
    speculation: dict[str, Any],
    words: tuple[str, str],
    max_steps: int,
) -> list[str]:
    """Decode greedily here, and in vLLM without and with drafts; a table of the acceptance, and what is equal.

    `speculation` is vLLM's speculative_config with as many drafts a step as the drafter makes; `words` are the name of
    ours for the table, and of what drafts in vLLM.
    """
    depth = speculation["num_speculative_tokens"]
    ours = decode_here(target, drafter, prompts, depth, max_steps)
    job = {"model": target.name, "max_steps": max_steps, "prompts": [prompt.tokens for prompt in prompts]}
    plain = engine.run(f"without {words[1]}", job | {"speculation": None})
    found = engine.run(f"with {words[1]}", job | {"speculation": speculation})
    theirs = Counted(found["tokens"], [[drafts] * depth for drafts in found["drafts"]], found["accepted"])
    same = sum(a == b for a, b in zip(plain["tokens"], theirs.tokens, strict=True))
    here = sum(a == b for a, b in zip(plain["tokens"], ours.tokens, strict=True))
    return [
        *table(f"vLLM {found['version']}", theirs, words[0], ours),
        f"vLLM's output with {words[1]} is its output without: {same} of {len(prompts)} prompts",
        f"vLLM's output without is the output here: {here} of {len(prompts)} prompts",
    ]


def decode_here(
    target: Target, drafter: Drafter, prompts: Sequence[Prompt], depth: int, max_steps: int
) -> Counted:
    """Greedily, one prompt after another, as vLLM is asked to: what begins within the limit is a whole proposal."""
    tokens, proposals, accepted = [], [], []
    for prompt in prompts:
        (row,) = decode(
            target.runner,
            drafter,
            [prompt.tokens],
            max_new_tokens=max_steps + depth,
            eos_token_ids=target.eos_token_ids,
        )
        tokens.append(row.tokens[:max_steps])
        rounds = within(row.accepted_lengths, max_steps)
        proposals.append([len(rounds)] * depth)
        accepted.append([sum(position < won - 1 for won in rounds) for position in range(depth)])
    return Counted(tokens, proposals, accepted)


def within(won: list[int], max_steps: int) -> list[int]:
    """The rounds, each by the tokens it won, that began before there were `max_steps`. The prompt gives the first."""
    begins = accumulate(won, initial=1)
    return [count for count, begin in zip(won, begins, strict=False) if begin < max_steps]


def table(their_name: str, theirs: Counted, our_name: str, ours: Counted) -> list[str]:
    """The share of proposals that were accepted up to each position, with 95 % intervals over prompts."""

    def share(accepted: np.ndarray, proposals: np.ndarray) -> np.ndarray:
        return accepted.sum(axis=-1) / np.maximum(proposals.sum(axis=-1), 1)

    def difference(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        return share(a, b) - share(c, d)

    lines = [f"{'position':<10}{their_name:<22}{our_name:<22}difference"]
    for position in range(len(ours.proposals[0])):
        columns = [
            [row[position] for row in counts]
            for engine in (theirs, ours)
            for counts in (engine.accepted, engine.proposals)
        ]
        estimates = [
            bootstrap_interval(share, *columns[:2]),
            bootstrap_interval(share, *columns[2:]),
            bootstrap_interval(difference, *columns),
        ]
        cells = [f"{e.value:.3f} [{e.low:.3f},{e.high:.3f}]" for e in estimates]
        lines.append(f"{position + 1:<10}{cells[0]:<22}{cells[1]:<22}{cells[2]}")
    return lines
