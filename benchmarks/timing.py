"""What the speed benchmarks share: interleaved runs, medians of ratios, one table, ``--json``."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate


def arguments(description: str | None, *, model: bool = True, runs: int = 7) -> argparse.ArgumentParser:
    """The options that every speed benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model:
        parser.add_argument("model", help="checkpoint folder or Hub id")
    parser.add_argument("--runs", type=int, default=runs, help="interleaved runs of each variant (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, every run included")
    return parser


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    runs: int,
    before: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each variant, ``runs`` times in turn after one round that is not counted.

    Variants take turns, so that whatever else the machine does meets them alike. ``before`` runs ahead of each, untimed. With
    ``time.process_time`` as the ``clock``, waiting for a processor does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for run in range(runs + 1):
        for name, variant in variants.items():
            if before is not None:
                before()
            start = clock()
            variant()
            if run:
                seconds[name].append(clock() - start)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios of runs made in the same round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def report(headers: Sequence[str], rows: Sequence[Sequence[object]], details: Any, as_json: bool) -> None:
    """Print the table, or the table and ``details`` as JSON."""
    if as_json:
        print(json.dumps({"table": [dict(zip(headers, row, strict=True)) for row in rows], **details}, indent=1))
    else:
        print(tabulate(rows, headers=headers, floatfmt=".3g"))


def drop_from_cache(paths: Sequence[Path]) -> None:
    """Ask the kernel to forget these files, so that the next read comes from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
