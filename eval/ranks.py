"""Several processes of one launch share the work of a benchmark; what one refuses, all refuse.

Every process does the same up to the work itself, so they meet in one kind of collective only: each gives an item,
or says what is wrong, and all get what all gave. A process in trouble therefore always finds the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from layerskip_model.errors import UserError
from layerskip_model.processes import PATIENCE, are_together

Item = TypeVar("Item")


class Refused(UserError):
    """What one process refused, raised on all of them."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those launched together.

    Attributes:
        index, count: its number, and how many there are.
        local_index, local_count: the same among those on this machine.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part: items r, r + N, r + 2 N, ... Raises UserError where some process would get none."""
        if len(items) < self.count:
            raise UserError(
                f"batches: {len(items)} for {self.count} processes; launch {len(items)} or fewer, or ask for "
                "more prompts with --num_samples"
            )
        return list(items[self.index :: self.count])

    def exchange(self, item: Item) -> list[Item]:
        """What each process gave, in their order. Raises Refused where one of them refused something instead."""
        return [item] if self.count == 1 else self._gather(None, item)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Get to the end of this together, or refuse together. Every `exchange` has to be inside.

        Where they refuse, the first process leaves first: launchers stop the others once one has failed, and it
        is the one that says why.
        """
        try:
            yield
            self.exchange(None)
        except UserError as error:
            if self.count > 1 and not isinstance(error, Refused):
                with suppress(Refused):
                    self._gather(str(error), None)
            if not self.is_first:
                with suppress(RuntimeError):
                    dist.barrier()  # ends when the first one's connections do
            raise

    def device(self, wanted: str | None, device_map: str | None) -> str | None:
        """The --device of this process: its own GPU, if there are any. Raises UserError where it has none."""
        if self.count == 1:
            return wanted
        if device_map is not None:
            raise UserError(
                f"--device_map '{device_map}' with {self.count} processes: each would take all GPUs; launch one"
            )
        if wanted not in (None, "cuda") or not torch.cuda.is_available():
            if wanted is not None and ":" in wanted:
                raise UserError(
                    f"--device '{wanted}' with {self.count} processes: each takes the GPU of its own number; "
                    "leave it out, or give cpu"
                )
            return wanted
        gpus = torch.cuda.device_count()
        if self.local_count > gpus:
            raise UserError(
                f"processes on this machine: {self.local_count}, and GPUs: {gpus}; launch no more than that, or "
                "give --device cpu"
            )
        return f"cuda:{self.local_index}"

    def settings(self, device: torch.device) -> dict[str, Any]:
        """What a report has to say about the processes that its numbers come from."""
        found: dict[str, Any] = {"processes": self.count}
        if self.local_count > 1 and device.type == "cpu":
            found["timing"] = "processes on one machine's CPU slow each other down, and not evenly"
        return found

    def _gather(self, refusal: str | None, item: Any) -> list[Any]:
        given: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(given, (refusal, item))
        except RuntimeError:  # gloo's connection to it is gone
            raise Refused(
                f"one of the {self.count} processes ended before its time; its own message says why"
            ) from None
        refusals = [refusal for refusal, _ in given if refusal is not None]
        if refusals:
            raise Refused(refusals[0])
        return [item for _, item in given]


ALONE = Ranks()


def join_ranks() -> Ranks:
    """Find the processes that torchrun or accelerate launched together with this one."""
    place = {name: int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK")}
    count = {name: int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    ranks = Ranks(place["RANK"], count["WORLD_SIZE"], place["LOCAL_RANK"], count["LOCAL_WORLD_SIZE"])
    if ranks.count > 1 and not are_together():
        dist.init_process_group("gloo", timeout=PATIENCE)  # results travel, and no tensor of a GPU
        if ranks.local_index < torch.cuda.device_count():
            torch.cuda.set_device(ranks.local_index)
    return ranks
