"""One capture over several processes, as ``torchrun`` and ``accelerate launch`` start them.

Every process holds the whole model and runs a share of the batches; sums of disjoint examples add up, so the
statistics are those of one process to the rounding of float64 sums. They are reduced over gloo, on the CPU, whatever the
model runs on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from steer2edit.errors import Steer2EditError, first_line
from steer2edit.runtime.launch import process_of

T = TypeVar("T")

# a process may wait for another that has a slower device; one that died is noticed at once, by its closed connection
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """This process, ``rank``, among ``size`` that capture together; on its own unless it says otherwise."""

    rank: int = 0
    size: int = 1

    def share(self, costs: Sequence[int]) -> list[int]:
        """Which of the pieces of work are this process's, in their order.

        The same pieces are dealt out in every process: the costliest first, each to whoever has least so far.
        """
        loads = [0] * self.size
        mine = []
        for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            least = loads.index(min(loads))
            loads[least] += costs[piece]
            if least == self.rank:
                mine.append(piece)
        return sorted(mine)

    def total(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The sum of every process's ``state`` by name, float64, in each of them."""
        if self.size == 1:
            return dict(state)
        # a process without examples of some kind has no sums of it, and must take part in adding them all the same
        shapes = {name: tuple(values.shape) for name, values in state.items()}
        everywhere = {name: shape for one in self._gathered(shapes) for name, shape in one.items()}
        summed = {}
        for name, shape in sorted(everywhere.items()):
            values = state[name].clone() if name in state else torch.zeros(shape, dtype=torch.float64)
            self._talk(lambda values=values: dist.all_reduce(values))  # type: ignore[misc]
            summed[name] = values
        return summed

    def together(self, work: Callable[[], T]) -> T:
        """Do ``work`` in every process; if it fails in any, all of them raise what the first that failed says.

        Raises Steer2EditError. No process is left waiting for one that has stopped.
        """
        if self.size == 1:
            return work()
        found: T | None = None
        fault: str | None = None
        try:
            found = work()
        except Steer2EditError as error:
            fault = str(error)
        faults = self._gathered(fault)
        failed = [(rank, text) for rank, text in enumerate(faults) if text is not None]
        if failed:
            rank, text = failed[0]
            # what is wrong with the input is wrong for all; what is wrong in one place needs the place
            raise Steer2EditError(text if len(failed) == self.size else f"process {rank} of {self.size}: {text}")
        return found  # type: ignore[return-value]

    def _gathered(self, value: T) -> list[T]:
        found: list[T | None] = [None] * self.size
        self._talk(lambda: dist.all_gather_object(found, value))
        return found  # type: ignore[return-value]

    def _talk(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:  # gloo's and the store's errors
            raise Steer2EditError(
                f"another of the {self.size} processes has ended: {first_line(error)[:200]}"
            ) from None


ALONE = World()


def whole(values: torch.Tensor, width: int) -> torch.Tensor:
    """Activations ``[n, width]`` of which each process may hold a part of the columns: the input of a row-parallel matrix.

    Raises Steer2EditError where the parts do not make up the whole.
    """
    if values.shape[-1] == width or not dist.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    found = torch.cat(parts, dim=-1)
    if found.shape[-1] != width:
        raise Steer2EditError(
            f"{len(parts)} processes hold {values.shape[-1]} columns each of an input of {width}: the plan for this family "
            "divides it otherwise; capture without --tensor-parallel"
        )
    return found


@contextmanager
def joined(backend: str | None = "gloo") -> Iterator[World]:
    """The world that this process was started in; ALONE where it was started by itself. Raises Steer2EditError.

    Without a ``backend`` each kind of device has its own, as activations on them need it.
    """
    process = process_of(os.environ)
    if process is None:
        yield ALONE
        return
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise Steer2EditError(
            f"process {process.rank} of {process.size} cannot join the others at MASTER_ADDR:MASTER_PORT: {first_line(error)}"
        ) from None
    try:
        yield World(process.rank, process.size)
    finally:
        dist.destroy_process_group()


def own_device(name: str) -> str:
    """The device of this process, where each process has its own.

    ``cuda`` and ``auto`` mean the device of the local rank.
    """
    process = process_of(os.environ)
    if process is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{process.local_rank % torch.cuda.device_count()}"
