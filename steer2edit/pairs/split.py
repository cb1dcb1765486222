"""Dealing prompts out: what a behaviour is captured on, chosen by and reported on, never the same prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

Part = Literal["train", "select", "report"]
SHARES: Mapping[Part, float] = {"train": 0.5, "select": 0.2, "report": 0.3}
"""Shares of the prompts."""


def deal(digests: Iterable[str], seed: int = 0) -> dict[str, Part]:
    """Which part each prompt belongs to, by its digest alone; the order of the prompts changes nothing.

    The parts have the sizes of :data:`SHARES`, rounded, and where there are three prompts or more none of them is empty.
    """
    ranked = sorted(set(digests), key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).hexdigest())
    count = len(ranked)
    select = max(round(SHARES["select"] * count), count >= 3)
    report = max(round(SHARES["report"] * count), count >= 2)
    sizes: dict[Part, int] = {"train": count - select - report, "select": select, "report": report}
    parts = [part for part, size in sizes.items() for _ in range(size)]
    return dict(zip(ranked, parts, strict=True))
