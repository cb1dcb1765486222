"""Resume an interrupted capture from the sums in its ``*.partial`` file.

The sums are stored from time to time.

The file says of which run it is: model, data, tokens, options and share of the work. Another run never takes it up.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer2edit.capture.accumulator import Accumulator
from steer2edit.capture.pairs import Pairs
from steer2edit.capture.stored import FORMAT
from steer2edit.errors import PlanError
from steer2edit.files.atomic import load_tensors, save_tensors
from steer2edit.files.untrusted import parse_json

EVERY_SECONDS = 60.0
# keeping the sums takes at most a twentieth of the time, however large they are: a gigabyte for 32 layers of 4096
_SHARE = 20.0


def identity(described: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides what a capture gives."""
    text = json.dumps({"format": FORMAT, **described}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Partial:
    """The sums of a running capture at ``path``; ``run`` is its :func:`identity`."""

    def __init__(self, path: Path, run: str, every: float = EVERY_SECONDS) -> None:
        self.path, self._run, self._every = path, run, every
        self._due = time.monotonic() + every

    def load(self, batches: int, pairs: Pairs = Pairs()) -> tuple[Accumulator, int]:  # noqa: B008
        """The stored sums of this run, whose data has these ``pairs``, and how many of its ``batches`` they hold.

        None where they are not of this run.
        """
        try:
            tensors, metadata = load_tensors(self.path)
            described = parse_json(metadata["partial"].encode(), unique=True)
            done = described["done"]
            if described["run"] != self._run or type(done) is not int or not 0 <= done <= batches:
                return Accumulator(pairs), 0
            return Accumulator.of(tensors, pairs), done
        except (PlanError, KeyError, ValueError, TypeError, RecursionError):
            return Accumulator(pairs), 0  # absent, or damaged: it only ever saved time

    def keep(self, accumulator: Accumulator, done: int) -> None:
        """Write the sums of the first ``done`` batches, if it is time to. Raises Steer2EditError on a full disk."""
        started = time.monotonic()
        if started < self._due:
            return
        save_tensors(self.path, accumulator.state(), {"partial": json.dumps({"run": self._run, "done": done})})
        now = time.monotonic()
        # 0 is taken at its word
        self._due = now + (max(self._every, _SHARE * (now - started)) if self._every else 0)


def partial_path(out: Path, rank: int = 0, size: int = 1) -> Path:
    """Where a capture into ``out`` keeps its sums: beside it, one file for each process."""
    return out.with_name(f"{out.name}.partial" if size == 1 else f"{out.name}.{rank}-of-{size}.partial")
