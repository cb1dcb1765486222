"""Comparing an artefact's files with those that base and plan give: by bytes, and by content where bytes differ."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from steer2edit.checkpoint import read_json
from steer2edit.checkpoint.gguf import read_gguf
from steer2edit.errors import Steer2EditError
from steer2edit.files.atomic import load_tensors
from steer2edit.lowering.resolve import Lowering, Resolved, Writing
from steer2edit.lowering.target import Comparison
from steer2edit.progress import Progress, silent

_BLOCK = 1 << 20


def compare_with_lowered(
    lower: Callable[[Resolved, Path, Writing, Progress], Lowering], resolved: Resolved, folder: Path, progress: Progress
) -> Comparison:
    """Lower the plan again into a temporary folder, and compare each file there with the artefact's file of that name.

    For targets whose files are small: everything is written a second time.
    """
    problems: list[str] = []
    count = 0
    with tempfile.TemporaryDirectory() as scratch, progress("compare files", total=1) as advance:
        lowering = lower(resolved, Path(scratch), Writing(), silent)
        expected = {
            path.relative_to(scratch).as_posix(): path for path in sorted(Path(scratch).rglob("*")) if path.is_file()
        }
        for name, ours in expected.items():
            tensors, differences = compare_file(ours, folder / name, name)
            count += tensors
            problems += differences
        advance(1)
    return Comparison(count, frozenset(expected), lowering, tuple(problems))


def same_file(a: Path, b: Path) -> bool:
    """Whether two files have the same bytes. Raises OSError where one cannot be read."""
    with open(a, "rb") as first, open(b, "rb") as second:
        while True:
            ours, theirs = first.read(_BLOCK), second.read(_BLOCK)
            if ours != theirs:
                return False
            if not ours:
                return True


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def compare_file(ours: Path, theirs: Path, name: str) -> tuple[int, list[str]]:
    """How many tensors ``ours`` holds (1 for files without), and in what ``theirs`` differs from it."""
    if not theirs.is_file():
        return 0, [f"{name} is missing"]
    try:
        same = same_file(ours, theirs)
        if name.endswith(".safetensors"):
            return _compare_tensors(load_tensors(ours), load_tensors(theirs), f"{name}: the metadata")
        if name.endswith(".gguf"):
            expected = read_gguf(ours)
            count, problems = _compare_tensors(expected[::-1], read_gguf(theirs)[::-1], "the field")
            return count, problems or ([] if same else [f"{name} differs from the file that the plan gives"])
        if not same and name.endswith(".json"):
            same = read_json(ours) == read_json(theirs)
    except (Steer2EditError, OSError) as error:
        return 0, [f"{name} cannot be read: {error}"]
    return 1, [] if same else [f"{name} differs from the one that the plan gives"]


def _compare_tensors(
    ours: tuple[Mapping[str, torch.Tensor], Mapping[str, object]],
    theirs: tuple[Mapping[str, torch.Tensor], Mapping[str, object]],
    field: str,
) -> tuple[int, list[str]]:
    """Tensors and fields of two files."""
    (expected, expected_fields), (tensors, fields) = ours, theirs
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is not in the plan" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} differs from the plan"
        for name in sorted(expected.keys() & tensors.keys())
        if not same_tensor(expected[name], tensors[name])
    ]
    problems += [
        f"{field} {key} is {fields.get(key)!r}, expected {expected_fields.get(key)!r}"
        for key in sorted(expected_fields.keys() | fields.keys())
        if fields.get(key) != expected_fields.get(key)
    ]
    return len(expected), problems
