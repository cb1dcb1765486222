"""What an engine answered, and how far two answers are apart. Standard library only: every engine's environment reads this.

A record is ``{"prompt": ids, "tokens": ids, "top": [[[id, log-probability], …], …]}``: greedy tokens, and at each of them the
most likely few. A work folder holds ``cases.json`` (what there is to run), ``references/CASE.json`` (variant → records, by
transformers) and ``results/ENGINE/CASE.json`` (what an engine gave).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOP = 5
Record = dict[str, Any]


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line of an engine's script: the work folder, and the models to run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK", help="the folder that prepare.py filled")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="keys of models (default: all)")
    return parser


def compare(ours: Sequence[Record], theirs: Sequence[Record]) -> dict[str, Any]:
    """Greedy tokens that agree, of how many, and the largest difference of a log-probability that both give.

    Positions count up to the first token that differs, that one included: behind it the texts are no longer the same. An engine
    that ends a text at its end token is compared as far as it went.
    """
    equal = total = 0
    largest = 0.0
    for one, two in zip(ours, theirs, strict=True):
        if one["prompt"] != two["prompt"]:
            raise ValueError("the records are of different prompts")
        length = min(len(one["tokens"]), len(two["tokens"]))
        total += length
        for position in range(length):
            mine, other = dict(one["top"][position]), dict(two["top"][position])
            shared = mine.keys() & other.keys()
            if not shared:
                largest = float("inf")
            largest = max([largest, *(abs(mine[token] - other[token]) for token in shared)])
            if one["tokens"][position] != two["tokens"][position]:
                break
            equal += 1
    return {"equal": equal, "total": total, "largest": largest}


def cases(work: Path) -> list[dict[str, Any]]:
    """Every model that there is to run."""
    return list(json.loads((work / "cases.json").read_text()))


def reference(work: Path, case: str) -> dict[str, list[Record]]:
    """What transformers gave, by variant."""
    return dict(json.loads((work / "references" / f"{case}.json").read_text()))


def keep(work: Path, engine: str, case: str, cells: dict[str, Any], versions: dict[str, str]) -> None:
    """Write an engine's cells of one model: by column, a comparison or ``{"error": reason}``."""
    path = work / "results" / engine / f"{case}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "versions": versions}, indent=1) + "\n")


def cell(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A comparison, or why the engine gave none: whatever an engine raises is a result here, not an accident."""
    try:
        return run()
    except Exception as error:
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[0][:200]}
