"""What a run of paper.py keeps: its rows, the model's own answers and the capture."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from greedy import Generate

from steer2edit.capture.resume import partial_path
from steer2edit.capture.statistics import Statistics
from steer2edit.errors import DataError
from steer2edit.evaluation.evaluate import Row
from steer2edit.evaluation.metrics import Sample
from steer2edit.runtime.model import LoadedModel

AT_A_TIME = 32
"""Answers that are written before they are kept; a kill loses those under way."""


class Journal:
    """A folder of one experiment on one model; ``settings`` are all that its numbers depend on.

    Raises DataError for a folder that holds an experiment with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / "settings.json"
        if stored.is_file():
            there = json.loads(stored.read_text(encoding="utf-8"))
            if changed := sorted(key for key in {*there, *settings} if there.get(key) != settings.get(key)):
                raise DataError(f"{folder} holds rows of other settings ({', '.join(changed)}): give another --out")
        else:
            whole = folder / "settings.json.new"
            whole.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            whole.replace(stored)
        self._rows, self._answers = folder / "rows.jsonl", folder / "own-answers.jsonl"
        self.rows: dict[str, dict[str, Any]] = {line["name"]: line["row"] for line in _lines(self._rows)}
        self._written: dict[str, list[int]] = {line["prompt"]: line["answer"] for line in _lines(self._answers)}

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        _append(self._rows, [{"name": name, "row": row}])
        self.rows[name] = dict(row)

    def writing(self, generate: Generate) -> Generate:
        """``generate`` for the model without an edit: each answer is written once, and kept."""

        def write(loaded: LoadedModel, texts: Sequence[str], tokens: int) -> list[list[int]]:
            names = [hashlib.sha256(f"{tokens} {text}".encode("utf-8", "surrogatepass")).hexdigest() for text in texts]
            wanted = {name: text for name, text in zip(names, texts, strict=True) if name not in self._written}
            missing = list(wanted.items())
            for first in range(0, len(missing), AT_A_TIME):
                part = missing[first : first + AT_A_TIME]
                answers = generate(loaded, [text for _, text in part], tokens)
                lines = [{"prompt": name, "answer": ids} for (name, _), ids in zip(part, answers, strict=True)]
                _append(self._answers, lines)
                self._written |= {line["prompt"]: line["answer"] for line in lines}  # type: ignore[misc]
            return [self._written[name] for name in names]

        return write

    def statistics(self, capture: Callable[[Path], Statistics]) -> Statistics:
        """What ``capture`` gives, once; it is told where to keep its sums on the way."""
        path = self.folder / "statistics.safetensors"
        if path.is_file():
            return Statistics.load(path)
        statistics = capture(partial_path(path))
        statistics.save(path)
        partial_path(path).unlink(missing_ok=True)
        return statistics


def row_of(stored: Mapping[str, Any]) -> Row:
    """A row of an evaluation, of what ``asdict`` made of it."""

    def rebuilt(values: Any) -> Any:
        return None if values is None else tuple(values)

    samples = {
        name: Sample(tuple(one["values"]), rebuilt(one["weights"]), rebuilt(one["groups"]))
        for name, one in stored["samples"].items()
    }
    return Row(**{**stored, "samples": samples, "answers": tuple(stored["answers"])})


def stored_row(row: Row) -> dict[str, Any]:
    """A row as JSON."""
    return asdict(row)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file; one that a kill cut short is taken off."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    yield from map(json.loads, data[:whole].splitlines())


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    print(__doc__)
