"""How this process was started: by itself, or as one of several by ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """One of ``size`` processes; ``local_rank`` counts those of one machine."""

    rank: int
    size: int
    local_rank: int


def process_of(environment: Mapping[str, str]) -> Process | None:
    """What torchrun's environment variables say; None for a process on its own.

    RANK and WORLD_SIZE alone are not enough: job schedulers set them too, with no one to meet at MASTER_ADDR.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [environment.get(name, "") for name in names]
    if "MASTER_ADDR" not in environment or not all(value.isascii() and value.isdigit() for value in given):
        return None
    rank, size, local = map(int, given)
    return Process(rank, size, local) if size > 1 else None
